"""From the first signal to the end: what runs is finished in its time, what comes is sent elsewhere, and nobody is left without
a word."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import httpx
import pytest

from mmv1.api.settings import ServerSettings
from tests.api.fake_llm import FakeLLM, body
from tests.api.test_server import TEXT, served, until

CHAT = "/v1/chat/completions"


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_while_answers_are_finished_whoever_comes_is_sent_elsewhere(llm: FakeLLM) -> None:
    llm.pause_before = 1

    async def main() -> None:
        async with served(llm) as server, httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            whole = asyncio.ensure_future(client.post(CHAT, json=body()))
            events = asyncio.ensure_future(client.post(CHAT, json=body(stream=True)))
            await until(lambda: len(llm.running) == 2)
            end()
            await asyncio.sleep(0)
            for reply in (await client.get("/health"), await client.post(CHAT, json=body()), await client.get("/v1/models")):
                assert reply.status_code == 503
                assert int(reply.headers["retry-after"]) > 0
                error = reply.json()["error"]
                assert (error["type"], error["code"]) == ("server_error", "shutting_down")
            assert (await client.get("/metrics")).status_code == 200
            assert not server.task.done()
            llm.resume.set()
            assert (await whole).json()["choices"][0]["message"]["content"] == TEXT
            assert (await events).text.endswith("data: [DONE]\n\n")
            assert len(llm.asked) == 2
            assert await server.status() == 0

    asyncio.run(main())


def test_a_server_that_does_nothing_ends_at_once(llm: FakeLLM) -> None:
    async def main() -> None:
        async with served(llm) as server:
            start = time.monotonic()
            end()
            assert await server.status() == 0
            assert time.monotonic() - start < 2

    asyncio.run(main())


@pytest.mark.parametrize("by", ["timeout", "second signal"])
def test_what_is_not_finished_in_time_ends_with_an_error(llm: FakeLLM, by: str) -> None:
    llm.pause_before = 1
    timeout_s = 0.3 if by == "timeout" else 600.0

    async def main() -> None:
        async with (
            served(llm, ServerSettings(shutdown_timeout_s=timeout_s)) as server,
            httpx.AsyncClient(base_url=server.url, timeout=20) as client,
        ):
            whole = asyncio.ensure_future(client.post(CHAT, json=body()))
            events = asyncio.ensure_future(client.post(CHAT, json=body(stream=True)))
            await until(lambda: len(llm.running) == 2)
            start = time.monotonic()
            end()
            if by == "second signal":
                while (await client.get("/health")).status_code != 503:
                    await asyncio.sleep(0.01)
                assert not (whole.done() or events.done())
                end()
            assert (await whole).status_code == 503
            assert (await whole).json()["error"]["code"] == "shutting_down"
            assert int((await whole).headers["retry-after"]) > 0
            first, *_, last = [line for line in (await events).text.splitlines() if line]
            assert json.loads(first.removeprefix("data: "))["choices"]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
            assert await server.status() == 0
            assert time.monotonic() - start < 5
            assert len(llm.aborted) == 2

    asyncio.run(main())


def test_a_request_that_will_not_end_does_not_keep_the_server(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.pause_before = 1
    monkeypatch.setattr(llm, "end_requests", lambda: None)

    async def main() -> None:
        async with (
            served(llm, ServerSettings(shutdown_timeout_s=0)) as server,
            httpx.AsyncClient(base_url=server.url, timeout=20) as client,
        ):
            answer = asyncio.ensure_future(client.post(CHAT, json=body()))
            await until(lambda: len(llm.running) == 1)
            start = time.monotonic()
            end()
            assert await server.status() == 0
            assert time.monotonic() - start < 6
            llm.resume.set()
            await asyncio.gather(answer, return_exceptions=True)

    asyncio.run(main())
