"""The load client of `mmv1 bench`: sends prompts to a server's chat endpoint, streaming, and notes when each token came.

It measures any server with OpenAI's API, and knows of it only that.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from mmv1.cli.bench_http import HttpClient
from mmv1.cli.workload import Prompt
from mmv1.errors import ConfigError, EngineError


class Sample(msgspec.Struct):
    """One request, as its client felt it. Seconds; `itls_s` are the times between one event with text and the next. With `error`
    the rest is what there was until then."""

    ttft_s: float = 0.0
    itls_s: list[float] = []
    latency_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    error: str = ""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_events = msgspec.json.Decoder(_Event)


class ModelCard(msgspec.Struct):
    """What a server says of its model. `root`: where it is, as vLLM and mmv1 say it."""

    id: str
    root: str = ""


class _Models(msgspec.Struct):
    data: list[ModelCard]


class LoadClient:
    """`ignore_eos` makes sure that every answer is as long as its prompt allows. Use as an async context manager."""

    def __init__(self, base_url: str, *, ignore_eos: bool, endpoint: str = "/v1/chat/completions") -> None:
        self._base_url = base_url
        self._endpoint = endpoint
        self._options = {"temperature": 0} | ({"ignore_eos": True} if ignore_eos else {})
        key = os.environ.get("OPENAI_API_KEY")
        try:
            self._http = HttpClient(base_url, {"Authorization": f"Bearer {key}"} if key else {})
        except ValueError as error:
            raise _no_server(base_url, error) from error

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    async def first_model(self) -> ModelCard:
        """The model that the server names first. Raises ConfigError."""
        try:
            status, body = await self._whole_answer("GET", "/v1/models")
        except OSError as error:
            raise _no_server(self._base_url, error) from error
        if status != 200:
            raise _no_server(self._base_url, f"{status}: {_reason(body)}")
        try:
            return msgspec.json.decode(body, type=_Models).data[0]
        except (msgspec.DecodeError, LookupError) as error:
            raise ConfigError(f"{self._base_url}/v1/models names no model: name one with --model") from error

    async def post(self, path: str) -> None:
        """Ask the server to do something of its own. Raises EngineError when it does not."""
        try:
            status, body = await self._whole_answer("POST", path)
        except OSError as error:
            raise EngineError(f"the server did not answer {path}: {error}") from error
        if status != 200:
            raise EngineError(f"the server refused {path} with {status}: {_reason(body)}")

    async def _whole_answer(self, method: str, path: str) -> tuple[int, bytes]:
        pieces: list[bytes] = []
        status = await self._http.ask(method, path, b"", lambda _, piece: pieces.append(piece))
        return status, b"".join(pieces)

    async def tokens_per_word(self, model: str, words: Callable[[int], str]) -> float:
        """How many tokens the server's tokenizer makes of one of `words`; also the proof that it answers. Raises EngineError."""
        few, many = [await self.send(model, Prompt(words(count), [], 1)) for count in (16, 80)]
        if error := few.error or many.error:
            raise EngineError(f"the server does not answer a first, short question: {error}")
        return max(1.0, (many.num_prompt_tokens - few.num_prompt_tokens) / 64)

    async def send_all(
        self,
        model: str,
        prompts: Sequence[Prompt],
        *,
        gaps_s: Sequence[float],
        max_concurrency: int | None,
        on_done: Callable[[], object] = lambda: None,
    ) -> list[Sample]:
        """Send each prompt its gap after the one before, with at most `max_concurrency` open at a time."""
        room = asyncio.Semaphore(max_concurrency or max(1, len(prompts)))

        async def one(prompt: Prompt) -> Sample:
            async with room:
                sample = await self.send(model, prompt)
            on_done()
            return sample

        async with asyncio.TaskGroup() as group:
            tasks = []
            for prompt, gap_s in zip(prompts, gaps_s, strict=True):
                if gap_s:
                    await asyncio.sleep(gap_s)
                tasks.append(group.create_task(one(prompt)))
        return [task.result() for task in tasks]

    async def send(self, model: str, prompt: Prompt) -> Sample:
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        options = {"max_tokens": prompt.max_tokens, **self._options}
        body = msgspec.json.encode({"model": model, "messages": prompt.messages(), **stream, **options})
        reader = _StreamReader()
        try:
            status = await self._http.ask("POST", self._endpoint, body, reader.take)
        except (OSError, msgspec.DecodeError) as error:
            reader.sample.error = f"{type(error).__name__}: {error}"
            return reader.sample
        return reader.finish(status)


class _StreamReader:
    """Makes a sample of an answer's pieces."""

    def __init__(self) -> None:
        self.sample = Sample()
        self._texts: list[str] = []
        self._rest = b""
        self._started = self._last = time.perf_counter()

    def take(self, status: int, piece: bytes) -> None:
        if status != 200:
            self._rest += piece
            return
        now = time.perf_counter()
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            data = line[5:].strip()
            if data and line.startswith(b"data:") and data != b"[DONE]":
                self._take_event(_events.decode(data), now)

    def _take_event(self, event: _Event, now: float) -> None:
        sample = self.sample
        if event.error is not None:
            sample.error = sample.error or str(event.error)[:300]
        if event.usage is not None:
            sample.num_prompt_tokens, sample.num_output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        if event.choices and (text := event.choices[0].delta.content) is not None:
            if self._last == self._started:
                sample.ttft_s = now - self._started
            elif now > self._last:  # what came in one piece is one: who speaks, and the first token
                sample.itls_s.append(now - self._last)
            self._last = now
            self._texts.append(text)

    def finish(self, status: int) -> Sample:
        sample = self.sample
        sample.latency_s = self._last - self._started
        sample.text = "".join(self._texts)
        if status != 200:
            sample.error = f"{status}: {_reason(self._rest)}"
        elif not sample.error and (not sample.num_output_tokens or self._last == self._started):
            sample.error = "the answer has no text or no usage"
        return sample


def _no_server(base_url: str, reason: object) -> ConfigError:
    said = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return ConfigError(f"no server answers at {base_url} ({said}): start one with mmv1 serve, or name it with --base-url")


def _reason(body: bytes) -> str:
    """The message in OpenAI's error object, else the body as it is."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])[:300]
    except (msgspec.DecodeError, LookupError, TypeError):
        return body.decode(errors="replace")[:300]


def arrival_gaps_s(rng: np.random.Generator, count: int, request_rate: float, burstiness: float = 1.0) -> list[float]:
    """Gaps of a Gamma distribution with the mean 1 / `request_rate`, as vLLM's: a Poisson process with `burstiness` 1, more even
    above, in bursts below. All at once when the rate is infinite. The first comes at once."""
    if request_rate == float("inf"):
        return [0.0] * count
    return [0.0, *map(float, rng.gamma(burstiness, 1 / (request_rate * burstiness), count - 1))]
