"""`mmv1 bench serve`: a load of random prompts and pictures on a running server. Flags, figures and their names are those of
`vllm bench serve`, where it has the same."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mmv1.cli.event_loop import run_until_signal
from mmv1.errors import ConfigError


class PictureSize(NamedTuple):
    """Pixels."""

    width: int
    height: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(title="what to measure", metavar="WHAT", dest="what", required=True, prog="mmv1 bench")
    what = "a running server with OpenAI's API, under a load of random prompts and pictures"
    serve = subparsers.add_parser("serve", help=what, description=f"Measure {what}.", usage="mmv1 bench serve [flags]")

    server = serve.add_argument_group("Server")
    server.add_argument("--base-url", metavar="URL", help="of the server; default: made of --host and --port")
    server.add_argument("--host", default="127.0.0.1", metavar="NAME", help="(default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000)")
    server.add_argument("--model", metavar="NAME", help="name in the API; default: the first that the server names")

    load = serve.add_argument_group("Load")
    _add(load, "--num-prompts", _whole(1), 100, "N", "requests")
    _add(load, "--num-warmups", _whole(0), 0, "N", "requests before them that are not counted")
    _add(load, "--request-rate", _rate, math.inf, "X", "requests/s, at random intervals; inf: all at once")
    _add(load, "--max-concurrency", _whole(1), None, "N", "most requests open at a time; default: no limit")
    _add(load, "--seed", _whole(0), 0, "N", "a new one makes words and pictures that no cache has seen")

    prompts = serve.add_argument_group("Prompts")
    _add(prompts, "--random-input-len", _whole(1), 1024, "N", "tokens of text, nearly")
    _add(prompts, "--random-output-len", _whole(1), 128, "N", "most tokens of an answer")
    prompts.add_argument("--ignore-eos", action="store_true", help="every answer has --random-output-len tokens")
    _add(prompts, "--num-images --random-mm-base-items-per-request", _whole(0), 0, "N", "pictures in a request")
    _add(prompts, "--image-size", _size, PictureSize(1024, 1024), "WxH", "their width and height in pixels")
    _add(prompts, "--image-reuse", _probability, 0.0, "P", "probability that a picture is one that was sent before")

    result = serve.add_argument_group("Result")
    result.add_argument("--save-result", action="store_true", help="write the figures to a JSON file too")
    result.add_argument("--result-dir", default=".", metavar="DIR", help="of the file (default: .)")
    result.add_argument("--result-filename", metavar="NAME", help="of the file; default: made of rate, concurrency, model, time")


def _add(group: Any, flags: str, kind: Callable[[str], Any], default: Any, metavar: str, help: str) -> None:
    shown = "x".join(map(str, default)) if isinstance(default, PictureSize) else default
    help += "" if default is None else f" (default: {shown})"
    group.add_argument(*flags.split(), type=kind, default=default, metavar=metavar, help=help)


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


def _rate(text: str) -> float:
    if not (rate := _number(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, nor inf")
    return rate


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


def run(namespace: argparse.Namespace) -> int:
    return run_until_signal(_bench(namespace))


async def _bench(namespace: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from mmv1.cli.figures import figures_of, lines_of
    from mmv1.cli.load import LoadClient, arrival_gaps_s
    from mmv1.cli.workload import random_prompts, random_words

    rng = np.random.default_rng(namespace.seed)
    base_url = (namespace.base_url or f"http://{namespace.host}:{namespace.port}").rstrip("/").removesuffix("/v1")
    async with LoadClient(base_url, max_tokens=namespace.random_output_len, ignore_eos=namespace.ignore_eos) as client:
        first = await client.first_model()
        model = namespace.model or first
        tokens_per_word = await client.tokens_per_word(model, lambda count: random_words(rng, count))
        prompts = random_prompts(
            rng,
            num_words=max(1, round(namespace.random_input_len / tokens_per_word)),
            num_images=namespace.num_images,
            size=namespace.image_size,
            image_reuse=namespace.image_reuse,
        )
        limit = namespace.max_concurrency
        warmups = list(islice(prompts, namespace.num_warmups))
        await client.send_all(model, warmups, gaps_s=[0.0] * len(warmups), max_concurrency=limit)
        counted = list(islice(prompts, namespace.num_prompts))  # made before the clock starts
        gaps_s = arrival_gaps_s(rng, len(counted), namespace.request_rate)
        started = time.perf_counter()
        with tqdm(total=len(counted), unit="req", disable=not sys.stderr.isatty()) as bar:
            samples = await client.send_all(model, counted, gaps_s=gaps_s, max_concurrency=limit, on_done=bar.update)
        duration_s = time.perf_counter() - started
    result = {**_described(namespace, model), **figures_of(samples, duration_s)}
    print("\n".join(lines_of(result)))
    if result["errors"]:
        print(f"mmv1: {result['failed']} requests failed; one of the errors: {result['errors'][0]}", file=sys.stderr)
    if namespace.save_result:
        _save(namespace, result)
    return 0 if result["completed"] else 1


def _described(namespace: argparse.Namespace, model: str) -> dict[str, Any]:
    """What was asked for. An infinite rate is the text "inf", as in vLLM's files: JSON has no such number."""
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model_id": model,
        "num_prompts": namespace.num_prompts,
        "request_rate": namespace.request_rate if math.isfinite(namespace.request_rate) else "inf",
        "max_concurrency": namespace.max_concurrency,
        "random_input_len": namespace.random_input_len,
        "random_output_len": namespace.random_output_len,
        "ignore_eos": namespace.ignore_eos,
        "num_images": namespace.num_images,
        "image_size": "x".join(map(str, namespace.image_size)),
        "image_reuse": namespace.image_reuse,
        "seed": namespace.seed,
    }


def _save(namespace: argparse.Namespace, result: dict[str, Any]) -> None:
    """Raises ConfigError."""
    concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] else ""
    made = f"{result['request_rate']}qps{concurrency}-{result['model_id'].split('/')[-1]}-{result['date']}.json"
    path = Path(namespace.result_dir) / (namespace.result_filename or made)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the result cannot be written to {path}: {error.strerror}") from error
    print(f"Written to {path}", file=sys.stderr)
