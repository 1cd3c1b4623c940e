"""`mmv1 run`: one question from the shell. The answer, as it comes, is all that goes to stdout."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmv1.cli.event_loop import run_until_signal
from mmv1.config import EngineConfig, resolve
from mmv1.errors import ConfigError, ImageError
from mmv1.log import configure_logging
from mmv1.types import SamplingParams

if TYPE_CHECKING:
    from mmv1.preprocess.media import ImageSource

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_URL_SCHEMES = ("http://", "https://", "data:")


class Question(NamedTuple):
    """`model`: "" for the small demo model."""

    model: str
    text: str
    pictures: list[ImageSource]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'mmv1 run "What is this?" cat.jpg asks the small demo model, and mmv1 run Qwen/Qwen2.5-VL-3B-Instruct "What is this?" '
        "cat.jpg another one. With --model, the first word is the question whatever it looks like."
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="QUESTION",
        help="- to read it from stdin; before it MODEL, if that is a model directory or a hub id (owner/name), and after it "
        "pictures: files or URLs",
    )
    answer = parser.add_argument_group("Answer")
    answer.add_argument("--system", metavar="TEXT", help="system message")
    answer.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens; default: until the model ends")
    answer.add_argument("--temperature", type=float, metavar="X", default=0.0, help="0, the default: always the likeliest token")


def run(namespace: argparse.Namespace) -> int:
    os.environ.setdefault("MMV1_LOG_LEVEL", "WARNING")  # of the engine's processes too
    configure_logging("run")
    question = _question_of(namespace.words, namespace.engine_args.model)
    # One request, and memory for one.
    config = resolve(dataclasses.replace(namespace.engine_args, model=question.model, max_num_seqs=1))
    params = _sampling_params(config, namespace)
    return run_until_signal(_answer(config, question, namespace.system, params))


def _question_of(words: list[str], model: str) -> Question:
    """Raises ConfigError. `model`: --model's."""
    words = list(words)
    if not model and len(words) > 1 and _is_model(words[0]):
        model = words.pop(0)
    elif not model and len(words) == 1 and _is_model(words[0]):
        raise ConfigError(f"{words[0]!r} is a model: say after it what to ask")
    elif not model and os.path.isfile(words[0]):
        raise ConfigError(f"{words[0]!r} is a file: say before it what to ask")
    text = sys.stdin.read().strip() if words[0] == "-" else words[0]
    if not text:
        raise ConfigError("the question is empty")
    return Question(model, text, [_picture(word) for word in words[1:]])


def _is_model(word: str) -> bool:
    return os.path.isfile(Path(word) / "config.json") or (_HUB_ID.fullmatch(word) is not None and not os.path.exists(word))


def _picture(word: str) -> ImageSource:
    """Files are looked for now, before an engine is started."""
    if word.lower().startswith(_URL_SCHEMES):
        return word
    path = Path(word).expanduser()
    if not os.path.isfile(path):  # unlike Path's it says no to what is too long for a name
        raise ConfigError(f"there is no picture file {word!r} (a question of several words needs quotes)")
    return path


def _sampling_params(config: EngineConfig, namespace: argparse.Namespace) -> SamplingParams:
    """The model directory's, with what the flags say. Raises ConfigError and RequestError, before an engine is started."""
    import msgspec

    from mmv1.api.chat import SamplingDefaults
    from mmv1.engine.sampling import check_sampling_params

    defaults = msgspec.structs.asdict(SamplingDefaults.of_model(config.model.path))
    said = {"temperature": namespace.temperature, "max_tokens": namespace.max_tokens}
    return check_sampling_params(SamplingParams(**defaults | said))


async def _answer(config: EngineConfig, question: Question, system: str | None, params: SamplingParams) -> int:
    from mmv1.engine.async_llm import AsyncLLM
    from mmv1.preprocess.prompt import ImagePart, Message, TextPart

    messages = [] if system is None else [Message("system", system)]
    messages.append(Message("user", [*map(ImagePart, question.pictures), TextPart(question.text)]))
    engine = AsyncLLM(config)
    await engine.start()
    try:
        async for delta in engine.generate(messages, params):
            print("".join(output.text for output in delta.outputs), end="", flush=True)
        print(flush=True)
    except ImageError as error:  # of several pictures the error says which by its number
        raise ConfigError(f"{question.pictures[0]!s}: {error}" if len(question.pictures) == 1 else str(error)) from error
    finally:
        await engine.close()
    return 0
