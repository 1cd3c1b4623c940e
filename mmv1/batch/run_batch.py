"""`mmv1 run-batch`: the requests of an OpenAI batch file, one JSON object a line, answered into another such file.

The output is its own journal: there is no second file that could disagree with it. An answer's `id` is made of the line that it
answers, so a rerun sees which lines are answered, and an output that belongs to another input is recognised. Every line of
the input gets exactly one line of the output, in the order in which they are finished.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import hashlib
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mmv1.batch.journal import Journal
from mmv1.batch.runner import Summary, on_signals
from mmv1.batch.runner import run as run_jobs
from mmv1.errors import ConfigError
from mmv1.log import configure_logging

if TYPE_CHECKING:
    from mmv1.batch.backend import Answer

_EMBEDDINGS = "/v1/embeddings"
_URLS = ("/v1/chat/completions", "/v1/completions", _EMBEDDINGS)
_ID = "batch_req_"
_BAR_INTERVAL_S = (10.0, 0.2)  # in a file; on a terminal


class Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: dict[str, Any]


class LineError(msgspec.Struct):
    """Why a line of the input is no request. `line` counts from 1."""

    code: str
    message: str
    param: str | None
    line: int


class OutputLine(msgspec.Struct):
    """Either `response`, also of a request that is refused (its status says so), or `error`. `custom_id` None: the input's line
    has none that could be used."""

    id: str  # the first field: by it the journal knows its own lines
    custom_id: str | None
    response: Response | None
    error: LineError | None


class _KnownResponse(msgspec.Struct):
    status_code: int


class _KnownLine(msgspec.Struct):
    """Of an earlier run's line what is needed here."""

    id: str
    response: _KnownResponse | None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input. `fault`: why it is no request; else `body` is, to `url`."""

    key: str
    custom_id: str | None
    url: str
    body: dict[str, Any]
    fault: LineError | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """All lines that are not blank. Raises ConfigError when the file cannot be read."""
    line_of: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text := text.removeprefix(codecs.BOM_UTF8).strip():  # which some editors begin a file with
                    yield _read_line(text, number, line_of)
    except OSError as error:
        raise ConfigError(f"--input-file {path} cannot be read ({error.strerror})") from error


def _read_line(text: bytes, number: int, line_of: dict[str, int]) -> Line:
    """`line_of`: the custom_ids of the lines before, to which this line's is added."""

    def fault(code: str, message: str, param: str | None = None) -> LineError:
        return LineError(code, f"line {number}: {message}", param, number)

    def unusable(error: LineError) -> Line:
        return Line(_key(b"%d " % number + text), None, "", {}, error)

    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return unusable(fault("invalid_json_line", f"not valid JSON: {error}"))
    if not isinstance(value, dict):
        return unusable(fault("invalid_json_line", "not a JSON object"))
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return unusable(fault("missing_required_parameter", "custom_id is missing, or is no text", "custom_id"))
    first = line_of.setdefault(custom_id, number)
    if first != number:
        return unusable(fault("duplicate_custom_id", f"custom_id {custom_id!r} is that of line {first}", "custom_id"))
    url, body = value.get("url"), value.get("body")
    wrong = None
    if value.get("method") != "POST":
        wrong = fault("invalid_method", f"method must be POST, not {value.get('method')!r}", "method")
    elif url not in _URLS:
        wrong = fault("invalid_url", f"url must be one of {', '.join(_URLS)}, not {url!r}", "url")
    elif not isinstance(body, dict):
        wrong = fault("missing_required_parameter", "body is missing, or is no JSON object", "body")
    return Line(_key(text), custom_id, str(url), body if isinstance(body, dict) else {}, wrong)


def _key(text: bytes) -> str:
    return _ID + hashlib.blake2b(text, digest_size=16).hexdigest()


class Output:
    """The output file: where the answer to a line is, by the line's key, and how many of the answers are failures."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError (see Journal)."""
        self.places: dict[str, int] = {}  # lines of the output, counted from 1
        self.num_failed = 0
        self._journal = Journal(path, self._recall, begins=b'{"id":"' + _ID.encode())

    def _recall(self, text: bytes) -> None:
        line = msgspec.json.decode(text, type=_KnownLine)
        self._count(line.id, None if line.response is None else line.response.status_code)

    def _count(self, key: str, status_code: int | None) -> None:
        self.places[key] = len(self.places) + 1
        self.num_failed += status_code != 200

    def write_fault(self, line: Line) -> None:
        self._count(line.key, None)
        self._journal.append(OutputLine(line.key, line.custom_id, None, line.fault))

    def write_answer(self, line: Line, answer: Answer) -> None:
        self._count(line.key, answer.status_code)
        response = Response(answer.status_code, answer.request_id, answer.body)
        self._journal.append(OutputLine(line.key, line.custom_id, response, None))

    def close(self) -> None:
        self._journal.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Batch")
    group.add_argument(
        "-i", "--input-file", required=True, type=Path, metavar="FILE",
        help='requests, one a line: {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}',
    )  # fmt: skip
    group.add_argument(
        "-o", "--output-file", required=True, type=Path, metavar="FILE",
        help="answers, one a line, as they are finished; if there are some already, the same command goes on with the rest",
    )  # fmt: skip
    group.add_argument("--url", help="ask this server, such as http://127.0.0.1:8000, in place of an engine started here")
    group.add_argument("--max-inflight", type=int, metavar="N", help="most requests at once; default: what keeps the engine busy")


def run(namespace: argparse.Namespace) -> int:
    """Returns the exit status: 0, 3 when lines of the output are failures, 130 after an interruption. Raises ConfigError,
    EngineDeadError."""
    input_file, output_file = namespace.input_file, namespace.output_file
    if namespace.max_inflight is not None and namespace.max_inflight < 1:
        raise ConfigError(f"--max-inflight must be at least 1, not {namespace.max_inflight}")
    if not input_file.is_file():
        raise ConfigError(f"--input-file {input_file} is not there, or no file")
    if output_file.exists() and input_file.samefile(output_file):
        raise ConfigError("--input-file and --output-file are the same file")
    configure_logging("batch")
    with contextlib.closing(Output(output_file)) as output:
        num_lines, num_open = _prepare(input_file, output, needs_engine=namespace.url is None)
        was_finished = False
        try:
            was_finished = num_open == 0 or _answer(namespace, output, num_open)
        finally:  # also when the engine dies
            _say(f"{output_file}: {len(output.places)} of {num_lines} lines are answered, {output.num_failed} are failures")
            if not was_finished:
                _say(f"The rest, with the same command: {shlex.join(['mmv1', *sys.argv[1:]])}")
    if not was_finished:
        return 130
    return 3 if output.num_failed else 0


def _prepare(input_file: Path, output: Output, *, needs_engine: bool) -> tuple[int, int]:
    """Write down what is wrong with lines of the input, and count them: all, and those to be answered. Raises ConfigError for an
    output that belongs to another input, and for embeddings where `needs_engine`: one that is started here makes none."""
    strangers = dict(output.places)
    faults, num_lines, num_open = [], 0, 0
    for line in read_lines(input_file):
        num_lines += 1
        strangers.pop(line.key, None)
        if line.key in output.places:
            continue
        if line.fault is None:
            num_open += 1
            if needs_engine and line.url == _EMBEDDINGS:
                raise ConfigError(f"{line.custom_id} is a request to {_EMBEDDINGS}: name a server that answers it with --url")
        else:
            faults.append(line)
    if strangers:
        first = min(strangers.values())
        raise ConfigError(
            f"{len(strangers)} of the answers in --output-file, the first in its line {first}, are to lines that --input-file "
            f"{input_file} does not have: remove them, or give another output"
        )
    for line in faults:
        output.write_fault(line)
    return num_lines, num_open


def _answer(namespace: argparse.Namespace, output: Output, num_open: int) -> bool:
    """Answer what is to be answered; False when a signal ended that before the end."""
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return not runner.run(_answer_all(namespace, output, num_open)).was_interrupted
    except (asyncio.CancelledError, KeyboardInterrupt):  # during the start, or the second of two
        return False


async def _answer_all(namespace: argparse.Namespace, output: Output, num_open: int) -> Summary:
    from tqdm import tqdm

    from mmv1.batch.backend import open_backend

    this_task = asyncio.current_task()
    if this_task is not None:
        on_signals(this_task.cancel)
    async with open_backend(namespace.url, namespace.engine_args) as backend:
        with tqdm(total=num_open, unit="req", mininterval=_BAR_INTERVAL_S[sys.stderr.isatty()]) as bar:

            def keep(line: Line, answer: Answer) -> None:
                output.write_answer(line, answer)
                bar.update()

            start = time.monotonic()
            summary = await run_jobs(
                read_lines(namespace.input_file),
                lambda line: backend.ask(line.body, line.url),
                done=output.places,
                max_inflight=namespace.max_inflight or backend.max_open,
                on_result=keep,
            )
        seconds = time.monotonic() - start
        _say(f"{summary.num_finished} requests in {seconds:.1f} s, {summary.num_finished / seconds:.1f} requests/s")
        return summary


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
