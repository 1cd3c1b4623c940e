"""What is taken in: how many may wait, of all and of one key, how large a body may be, and what the refused are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from mmv1.api.admission import RETRY_AFTER_S, Admission
from mmv1.api.settings import ServerSettings
from mmv1.errors import RequestError
from tests.api.fake_llm import MODEL, FakeLLM, body
from tests.api.test_server import MESSAGES, TEXT, raw_request, served, until

CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def client_of(llm: FakeLLM, settings: ServerSettings) -> AsyncIterator[httpx.AsyncClient]:
    async with served(llm, settings) as server, httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        yield client


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """A scrape, which is never refused."""
    lines = (await client.get("/metrics")).text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"mmv1:{name}{{")]
    return float(line.rpartition(" ")[2])


async def rejections(client: httpx.AsyncClient) -> float:
    return await metric(client, "admission_rejections_total")


def test_who_comes_when_as_many_wait_as_may_is_told_to_come_later(llm: FakeLLM) -> None:
    llm.pause_before = 0

    async def main() -> None:
        async with client_of(llm, ServerSettings(max_queued_requests=2)) as client:
            waiting = [asyncio.ensure_future(client.post(CHAT, json=body(stream=stream))) for stream in (True, False)]
            await until(lambda: len(llm.running) == 2)
            refused = await client.post(CHAT, json=body())
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == str(RETRY_AFTER_S)
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert await rejections(client) == 1
            for method, path in (("GET", "/health"), ("POST", "/ping"), ("GET", "/v1/models")):
                assert (await client.request(method, path)).status_code == 200
            llm.resume.set()
            assert [(await answer).status_code for answer in waiting] == [200, 200]
            assert (await client.post(CHAT, json=body())).status_code == 200  # and their places are free again
            assert len(llm.asked) == 3

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_with_its_first_token_a_request_waits_no_longer(llm: FakeLLM, stream: bool) -> None:
    llm.pause_before = 1

    async def main() -> None:
        async with client_of(llm, ServerSettings(max_queued_requests=1)) as client:
            answers = []
            for number in range(5):
                answers.append(asyncio.ensure_future(client.post(CHAT, json=body(stream=stream))))
                while await metric(client, "time_to_first_token_seconds_count") <= number:
                    assert not answers[-1].done(), answers[-1].result().text
            llm.resume.set()
            assert [(await answer).status_code for answer in answers] == [200] * 5

    asyncio.run(main())


def test_requests_that_fail_or_are_given_up_leave_their_places(llm: FakeLLM) -> None:
    async def main() -> None:
        async with client_of(llm, ServerSettings(max_queued_requests=1)) as client:
            for wrong in ({"temperature": 9}, {"model": "another"}):
                assert (await client.post(CHAT, json=body(**wrong))).status_code in (400, 404)
            llm.pause_before = 0
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=body(), timeout=0.2)
            await until(lambda: not llm.running)
            llm.resume.set()
            assert (await client.post(CHAT, json=body())).status_code == 200

    asyncio.run(main())


def test_one_key_cannot_take_the_others_places(llm: FakeLLM) -> None:
    llm.pause_before = 0
    settings = ServerSettings(api_keys=("loud", "quiet"), max_queued_requests=10, max_queued_requests_per_key=2)

    async def main() -> None:
        async with client_of(llm, settings) as client:

            def post(key: str) -> asyncio.Future[httpx.Response]:
                return asyncio.ensure_future(client.post(CHAT, json=body(), headers={"Authorization": f"Bearer {key}"}))

            loud = [post("loud") for _ in range(6)]
            await until(lambda: sum(answer.done() for answer in loud) == 4 and len(llm.running) == 2)
            quiet = [post("quiet") for _ in range(2)]
            await until(lambda: len(llm.running) == 4)
            llm.resume.set()
            assert sorted([(await answer).status_code for answer in loud]) == [200, 200, 429, 429, 429, 429]
            assert [(await answer).status_code for answer in quiet] == [200, 200]

    asyncio.run(main())


def test_the_official_client_comes_again_and_is_answered(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmv1.api.admission.RETRY_AFTER_S", 1)
    llm.pause_before = 0

    async def main() -> None:
        async with (
            served(llm, ServerSettings(max_queued_requests=1)) as server,
            httpx.AsyncClient(base_url=server.url, timeout=20) as first,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=3) as client,
        ):
            holding = asyncio.ensure_future(first.post(CHAT, json=body()))
            await until(lambda: len(llm.running) == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                await client.with_options(max_retries=0).chat.completions.create(model=MODEL, messages=MESSAGES)
            assert refused.value.code == "rate_limit_exceeded"
            patient = asyncio.ensure_future(client.chat.completions.create(model=MODEL, messages=MESSAGES))
            while await rejections(first) < 2:
                await asyncio.sleep(0.01)
            llm.resume.set()
            assert (await patient).choices[0].message.content == TEXT
            assert (await holding).status_code == 200

    asyncio.run(main())


def test_retry_after_is_the_time_that_the_queue_takes_at_the_rate_of_the_last_minute() -> None:
    now = 1000.0
    admission = Admission(ServerSettings(max_queued_requests=30), now=lambda: now)
    assert admission.retry_after_s() == RETRY_AFTER_S
    for _ in range(20):  # two a second for ten seconds
        now += 0.5
        admission.take_turn("").leave()
    now += 0.5
    turns = [admission.take_turn("") for _ in range(30)]
    with pytest.raises(RequestError) as refused:
        admission.take_turn("")
    assert refused.value.status == 429
    assert admission.retry_after_s() == 15  # 30 requests at 2 a second
    for turn in turns[:25]:
        turn.leave()
        turn.leave()  # a turn is left once
    assert admission.retry_after_s() == 2  # 5 at 4.5 a second
    now += 3600  # nothing of an hour ago counts
    assert admission.retry_after_s() == RETRY_AFTER_S
    for _ in range(2):
        admission.take_turn("").leave()
        now += 29
    for _ in range(25):
        admission.take_turn("")
    assert admission.retry_after_s() == 60  # no client of OpenAI's waits longer for one answer


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(llm: FakeLLM) -> None:
    async def main() -> None:
        async with served(llm, ServerSettings(max_request_bytes=1000)) as server:
            head, _, _ = raw_request(b"x" * 1001).partition(b"\r\n\r\n")
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head + b"\r\n\r\n")  # and nothing of the body
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert answer.startswith(b"HTTP/1.1 413")
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            error = json.loads(await reader.readexactly(length))["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
            assert "1000 bytes" in error["message"]
            writer.close()
            async with httpx.AsyncClient() as client:  # who sends all of it first sees the refusal too
                large = await client.post(f"{server.url}{CHAT}", json=body(user="x" * 5_000_000))
                assert large.status_code == 413
                assert (await client.post(f"{server.url}{CHAT}", json=body())).status_code == 200
            assert len(llm.asked) == 1

    asyncio.run(main())
