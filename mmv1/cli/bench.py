"""`mmv1 bench`: its flags. `serve` puts a load on a running server; `ablate` starts servers itself, each with one mechanism
switched off. Flags, figures and their names are those of `vllm bench serve`, where it has the same."""

from __future__ import annotations

import argparse
import ast
import math
import shlex
from collections.abc import Callable
from typing import Any

from mmv1.cli.event_loop import run_until_signal
from mmv1.cli.figures import TIMES
from mmv1.cli.workload import WORKLOADS, PictureSize

MECHANISMS = {
    "prefix-cache": "--no-enable-prefix-caching",
    "encoder-cache": "--no-encoder-cache",
    "chunked-prefill": "--no-enable-chunked-prefill",
    "async-stepping": "--no-async-scheduling",
    "graphs": "--enforce-eager",
    "encoder-stream": "--no-encoder-stream",
    "fused-kernels": "--no-fused-kernels",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(title="what to measure", metavar="WHAT", dest="what", required=True, prog="mmv1 bench")
    what = "a running server with OpenAI's API, under a load of prompts and pictures"
    serve = subparsers.add_parser("serve", help=what, description=f"Measure {what}.", usage="mmv1 bench serve [flags]")
    _add_server(serve.add_argument_group("Server"))
    _add_load(serve.add_argument_group("Load"))
    _add_prompts(serve.add_argument_group("Random prompts"))
    _add_figures(serve.add_argument_group("Figures"))
    _add_result(serve.add_argument_group("Result"), "made of rate, concurrency, model, time")

    what = "what each mechanism of the engine is worth, with servers of its own that have it switched off"
    usage = "mmv1 bench ablate [MODEL] [flags]"
    ablate = subparsers.add_parser("ablate", help=what, description=f"Measure {what}.", usage=usage)
    _add_ablate(ablate)
    _add_result(ablate.add_argument_group("Result"), "made of workload, time")


def _add_server(group: Any) -> None:
    _add(group, "--base-url", str, None, "URL", "of the server; default: made of --host and --port")
    _add(group, "--host", str, "127.0.0.1", "NAME", "")
    _add(group, "--port", int, 8000, "N", "")
    _add(group, "--endpoint", str, "/v1/chat/completions", "PATH", "of OpenAI's chat API")
    _add(group, "--model", str, None, "NAME", "name in the API; default: the first that the server names")
    text = "record the load with the server's torch profiler; needs a server with --torch-profiler-dir, or vLLM's"
    group.add_argument("--profile", action="store_true", help=text)


def _add_load(group: Any) -> None:
    text = "prompts, pictures, concurrency and lengths by one name, after warm-up requests; default: random prompts as said below"
    group.add_argument("--workload", choices=tuple(WORKLOADS), help=text)
    _add(group, "--num-prompts", _whole(1), None, "N", "requests; default: 100, or the workload's")
    _add(group, "--num-warmups", _whole(0), None, "N", "requests before them that are not counted; default: 0, or the workload's")
    _add(group, "--request-rate", _above_zero, math.inf, "X", "requests/s, at random intervals; inf: all at once")
    _add(group, "--burstiness", _above_zero, 1.0, "X", "of the intervals: 1 is a Poisson process, less is in bursts")
    _add(group, "--max-concurrency", _whole(1), None, "N", "most requests open at a time; default: no limit, or the workload's")
    _add(group, "--seed", _whole(0), 0, "N", "a new one makes words and pictures that no cache has seen")
    text = "every answer is as long as it may be; a workload's are"
    group.add_argument("--ignore-eos", action="store_true", help=text)
    _add(group, "--random-output-len", _whole(1), None, "N", "most tokens of an answer; default: 128, or the workload's")


def _add_prompts(group: Any) -> None:
    text = "random: words; random-mm: words and pictures; default: as --random-mm-base-items-per-request says"
    group.add_argument("--dataset-name", choices=("random", "random-mm"), help=text)
    _add(group, "--random-input-len", _whole(1), 1024, "N", "tokens of text, nearly")
    _add(group, "--random-prefix-len", _whole(0), 0, "N", "tokens before them that all prompts share, nearly")
    _add(group, "--random-range-ratio", _below_one, 0.0, "X", "how far lengths go from what is said, up and down")
    items = "pictures in a request; default: 1 with random-mm"
    _add(group, "--num-images --random-mm-base-items-per-request", _whole(0), None, "N", items)
    _add(group, "--image-size", _size, None, "WxH", "width and height of all pictures in pixels; default: 1024x1024")
    buckets = "heights and widths with their probabilities: '{(448, 448, 1): 0.5, (1024, 768, 1): 0.5}'; the third number is 1"
    _add(group, "--random-mm-bucket-config", _buckets, None, "DICT", buckets)
    _add(group, "--mm-pool-size", _whole(1), 16, "N", "pictures that come again and again")
    _add(group, "--mm-reuse", _probability, 0.0, "P", "probability that a picture is one of them")


def _add_figures(group: Any) -> None:
    names, numbers = ",".join(TIMES), "percentiles to give, separated by commas"
    _add(group, "--percentile-metrics", _metrics, tuple(TIMES), "NAMES", f"times to give, separated by commas (default: {names})")
    _add(group, "--metric-percentiles", _percentiles, (99.0,), "NUMBERS", f"{numbers} (default: 99)")
    text = "most ms of ttft, tpot and e2el in a request that counts for the goodput: ttft:1000 tpot:50"
    group.add_argument("--goodput", type=_goodput, nargs="+", metavar="NAME:MS", help=text)
    text = "of the model served, for the floor of the load; default: what the server calls its root, if that is here"
    _add(group, "--model-dir", str, None, "DIR", text)
    _add(group, "--device-tflops", _above_zero, 800.0, "X", "of the device, for the floor: an H100's, as measured")
    _add(group, "--device-tbps", _above_zero, 3.0, "X", "its memory's TB/s, likewise")


def _add_result(group: Any, made_of: str) -> None:
    group.add_argument("--save-result", action="store_true", help="write the figures to a JSON file too")
    group.add_argument("--save-detailed", action="store_true", help="with every request by itself")
    _add(group, "--result-dir", str, ".", "DIR", "of the file")
    _add(group, "--result-filename", str, None, "NAME", f"of the file; default: {made_of}")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="as for mmv1 serve")
    text = "of mmv1 serve, for every server: '--load-format dummy --max-model-len 8192'"
    parser.add_argument("--serve-flags", type=_flags, default=[], metavar="FLAGS", help=text)
    group = parser.add_argument_group("Load")
    group.add_argument("--workload", choices=tuple(WORKLOADS), default="caption", help="(default: caption)")
    _add(group, "--num-prompts", _whole(1), None, "N", "requests; default: the workload's")
    _add(group, "--max-concurrency", _whole(1), None, "N", "most requests open at a time; default: the workload's")
    _add(group, "--rounds", _whole(1), 3, "N", "loads on each server; the figures are medians")
    _add(group, "--seed", _whole(0), 0, "N", "of the first round; each further one has its own")
    text = "mechanisms to switch off, one after the other; default: all of them"
    group.add_argument("--without", nargs="+", choices=tuple(MECHANISMS), default=tuple(MECHANISMS), help=text)


def _add(group: Any, flags: str, kind: Callable[[str], Any], default: Any, metavar: str, help: str) -> None:
    if default is not None and not isinstance(default, tuple):
        help = f"{help} (default: {default})".strip()
    group.add_argument(*flags.split(), type=kind, default=default, metavar=metavar, help=help)


# ---- what a flag's words mean ----


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _above_zero(text: str) -> float:
    if not (number := _number(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _below_one(text: str) -> float:
    if not 0 <= (number := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to below 1")
    return number


def _probability(text: str) -> float:
    if not 0 <= (probability := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return probability


def _size(text: str) -> PictureSize:
    width, _, height = text.partition("x")
    try:
        return PictureSize(_whole(1)(width), _whole(1)(height))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels, such as 1024x768") from None


def _buckets(text: str) -> dict[PictureSize, float]:
    """Sizes with their shares. vLLM's dict has Python's syntax, heights first."""
    refused = argparse.ArgumentTypeError(f"{text!r} is no dict such as '{{(448, 448, 1): 1.0}}', heights first")
    try:
        buckets = ast.literal_eval(text)
        sizes = {PictureSize(int(w), int(h)): float(share) for (h, w, frames), share in buckets.items() if frames == 1}
    except (ValueError, SyntaxError, TypeError, AttributeError):
        raise refused from None
    wanted = [share for (_, _, frames), share in buckets.items() if frames != 1]
    if any(wanted) or any(min(size) < 1 for size in sizes) or min(sizes.values(), default=-1.0) < 0 or not sum(sizes.values()):
        raise refused
    return sizes


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(TIMES):
        raise argparse.ArgumentTypeError(f"{text!r} has {sorted(unknown)[0]!r}, which is none of {', '.join(TIMES)}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    numbers = tuple(map(_number, text.split(",")))
    if not all(0 <= number <= 100 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers from 0 to 100, separated by commas")
    return numbers


def _goodput(text: str) -> tuple[str, float]:
    name, _, most = text.partition(":")
    if name not in ("ttft", "tpot", "e2el") or not _number(most) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no ttft, tpot or e2el with its most ms, such as ttft:1000")
    return name, float(most)


def _flags(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error}") from None


# ---- the commands ----


def run(namespace: argparse.Namespace) -> int:
    if namespace.what == "ablate":
        from mmv1.cli.bench_ablate import ablate

        return run_until_signal(ablate(namespace))
    from mmv1.cli.bench_serve import bench_serve

    return run_until_signal(bench_serve(namespace))
