"""`mmv1 caption`: the flags of the command, and what they ask about each picture. The work itself is caption_job.py's."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmv1.errors import ConfigError
from mmv1.log import configure_logging

if TYPE_CHECKING:
    from mmv1.batch.captioner import Question

DEFAULT_PROMPT = "Describe this image."
_INTERRUPTED = 130
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE",
        help="a folder (with all below it), a picture, a URL, a glob, a list of files (.txt; - is standard input), .jsonl, "
        ".parquet, or webdataset shards such as {00000..00099}.tar",
    )  # fmt: skip
    _add_input(parser.add_argument_group("Input").add_argument)
    _add_output(parser.add_argument_group("Output").add_argument)
    _add_question(parser.add_argument_group("Question"))
    _add_sampling(parser.add_argument_group("Sampling").add_argument)
    _add_ranking(parser.add_argument_group("Ranking").add_argument)
    add = parser.add_argument_group("Where it runs").add_argument
    add("--url", metavar="URL", help="a server with OpenAI's API to ask; default: an engine started here")
    add("--max-inflight", type=_positive, metavar="N", help="pictures under way at once; default: what keeps the engine busy")


def _add_input(add: Callable[..., object]) -> None:
    add("--image-column", metavar="NAME", help="of .jsonl and .parquet: the picture, as path, URL or bytes (default: image); "
        "of shards: its extension")  # fmt: skip
    add("--key-column", metavar="NAME", help="what names the picture; default: its path, or file and row")
    add("--limit", type=_positive, metavar="N", help="only the first N pictures")
    add("--shard", type=_share, metavar="I/N", help="only share I of N, from 0, for N runs that divide the pictures among them")


def _add_output(add: Callable[..., object]) -> None:
    add("--output", metavar="PLACE", help="NAME.jsonl, NAME.parquet or wds:FOLDER for webdataset shards; default: a text file "
        "beside each picture")  # fmt: skip
    add("--caption-extension", metavar=".EXT", help="of the text files; default: .txt, with --schema .json")
    add("--samples-per-shard", type=_positive, default=1000, metavar="N", help="of webdataset shards (default: 1000)")
    add("--overwrite", action="store_true", help="begin anew: what an earlier run wrote is renamed, text files are replaced")


def _add_question(group: argparse._ArgumentGroup) -> None:
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help=f"what is asked about each picture (default: {DEFAULT_PROMPT})")
    prompts.add_argument("--prompt-file", metavar="FILE", help="the same, from a file")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument("--schema", metavar="FILE", help="JSON schema that captions must follow")
    group.add_argument("--schema-tries", type=_positive, default=4, metavar="N", help="answers to ask for (default: 4)")


def _add_sampling(add: Callable[..., object]) -> None:
    add("--max-tokens", type=_positive, default=256, metavar="N", help="longest caption (default: 256)")
    for name in _SAMPLING:
        default = "0, or 1 with several captions" if name == "temperature" else "the model's"
        kind, metavar = (int, "N") if name == "top_k" else (_number, "X")
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"default: {default}")
    add("--stop", nargs="+", metavar="TEXT", help="what ends a caption")


def _add_ranking(add: Callable[..., object]) -> None:
    add("--num-captions", type=_positive, default=1, metavar="N", help="captions drawn for each picture (default: 1)")
    add("--rank", choices=["clip"], help="keep the one that fits best, by CLIPScore (needs the extra `clip`)")
    add("--min-clip-score", type=_number, metavar="X", help="captions that score less, of 0 to 2.5, count as failed")
    add("--clip-model", metavar="NAME:WEIGHTS", help="of open_clip, WEIGHTS: tag or file (default: ViT-B-32:laion2b_s34b_b79k)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} has not the form I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def run(namespace: argparse.Namespace) -> int:
    """Exit status: 0, 3 when pictures have no caption, 130 after Ctrl-C. Raises ConfigError, EngineDeadError."""
    import uvloop

    from mmv1.batch.caption_job import CaptionJob

    configure_logging("caption")
    question = question_of(namespace)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(CaptionJob(namespace, question).run())
        except (asyncio.CancelledError, KeyboardInterrupt):  # during the start, or the second of two
            return _INTERRUPTED


def question_of(namespace: argparse.Namespace) -> Question:
    """Raises ConfigError for flags that cannot be together, RequestError for sampling that cannot be."""
    from mmv1.batch.captioner import Question, schema_validator
    from mmv1.engine.sampling import check_sampling_params
    from mmv1.types import SamplingParams

    if namespace.schema and namespace.num_captions > 1:
        raise ConfigError("--schema goes with one caption a picture: leave out --num-captions")
    if namespace.rank is None and namespace.min_clip_score is None and namespace.clip_model is not None:
        raise ConfigError("--clip-model does nothing by itself: give --rank clip or --min-clip-score")
    schema = None
    if namespace.schema:
        if namespace.rank is not None or namespace.min_clip_score is not None:
            raise ConfigError("CLIP scores sentences, not JSON: --schema does not go with --rank and --min-clip-score")
        schema = _read_schema(namespace.schema)
        schema_validator(schema)
    sampling = {name: value for name in (*_SAMPLING, "stop") if (value := getattr(namespace, name)) is not None}
    sampling.setdefault("temperature", 0.0 if namespace.num_captions == 1 else 1.0)
    if namespace.num_captions > 1 and sampling["temperature"] == 0:
        raise ConfigError("--num-captions with --temperature 0 would give the same caption many times: give a higher one")
    check_sampling_params(SamplingParams(n=namespace.num_captions, max_tokens=namespace.max_tokens, **sampling))
    return Question(
        prompt=_prompt(namespace),
        system=namespace.system,
        max_tokens=namespace.max_tokens,
        sampling=sampling,
        num_captions=namespace.num_captions,
        max_pixels=namespace.engine_args.max_pixels,
        schema=schema,
        num_tries=namespace.schema_tries if schema is not None else 1,
    )


def _prompt(namespace: argparse.Namespace) -> str:
    if namespace.prompt_file is None:
        return namespace.prompt if namespace.prompt is not None else DEFAULT_PROMPT
    try:
        return Path(namespace.prompt_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {namespace.prompt_file} cannot be read ({_reason(error)})") from error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _read_schema(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--schema {path} cannot be read ({_reason(error)})") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"--schema {path} must hold a JSON object")
    return schema
