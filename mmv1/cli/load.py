"""The load client of `mmv1 bench`: sends prompts to a server's chat endpoint, streaming, and notes when each token came.

It measures any server with OpenAI's API, and knows of it only that.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import msgspec
import numpy as np

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


class LoadClient:
    """`max_tokens`: length of every answer, which only `ignore_eos` makes sure of. Use as an async context manager."""

    def __init__(self, base_url: str, *, max_tokens: int, ignore_eos: bool) -> None:
        self._base_url = base_url
        self._options = {"max_tokens": max_tokens, "temperature": 0} | ({"ignore_eos": True} if ignore_eos else {})
        key = os.environ.get("OPENAI_API_KEY")
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=30.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # straight to the server: a proxy would be measured too
        )

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The model that the server names first. Raises ConfigError."""
        try:
            response = await self._http.get("/v1/models")
            return str(response.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"no server answers at {self._base_url} ({reason}): start one with mmv1 serve, or name it with --base-url"
            raise ConfigError(message) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self._base_url}/v1/models names no model: name one with --model") from error

    async def tokens_per_word(self, model: str, words: Callable[[int], str]) -> float:
        """How many tokens the server's tokenizer makes of one of `words`; also the proof that it answers. Raises EngineError."""
        few, many = [await self.send(model, Prompt(words(count), []), max_tokens=1) for count in (16, 80)]
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
        room = asyncio.Semaphore(max_concurrency or len(prompts))

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

    async def send(self, model: str, prompt: Prompt, **options: Any) -> Sample:
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        body = msgspec.json.encode({"model": model, "messages": prompt.messages(), **stream, **self._options, **options})
        sample = Sample()
        started = time.perf_counter()
        try:
            headers = {"content-type": "application/json"}
            async with self._http.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
                if response.status_code != 200:
                    sample.error = f"{response.status_code}: {_reason(await response.aread())}"
                    return sample
                await _read(response, started, sample)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            sample.error = f"{type(error).__name__}: {error}"
        return sample


def _reason(body: bytes) -> str:
    """The message in OpenAI's error object, else the body as it is."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])[:300]
    except (msgspec.DecodeError, LookupError, TypeError):
        return body.decode(errors="replace")[:300]


async def _read(response: httpx.Response, started: float, sample: Sample) -> None:
    last = started
    async for event in _data_of(response):
        now = time.perf_counter()
        if event.error is not None:
            sample.error = str(event.error)[:300]
            return
        if event.usage is not None:
            sample.num_prompt_tokens, sample.num_output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        if event.choices and event.choices[0].delta.content is not None:
            if last == started:
                sample.ttft_s = now - started
            else:
                sample.itls_s.append(now - last)
            last = now
    sample.latency_s = last - started
    if not sample.num_output_tokens or last == started:
        sample.error = "the answer has no text or no usage"


async def _data_of(response: httpx.Response) -> AsyncIterator[_Event]:
    """The events of the stream, less its end mark."""
    rest = b""
    async for piece in response.aiter_raw():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if len(data) < len(line) and line.startswith(b"data:") and data != b"[DONE]":
                yield _events.decode(data)


def arrival_gaps_s(rng: np.random.Generator, count: int, request_rate: float) -> list[float]:
    """A Poisson process of `request_rate` requests/s; all at once when it is infinite. The first comes at once."""
    if request_rate == float("inf"):
        return [0.0] * count
    return [0.0, *map(float, rng.exponential(1 / request_rate, count - 1))]
