"""The server as its clients meet it: a real socket, the official client unchanged, disconnects, signals, the engine's death."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable

import httpx
import openai
import pytest

from mmv1.api.server import serve
from mmv1.api.settings import ServerSettings
from mmv1.errors import ImageError
from tests.api.fake_llm import MODEL, PIECES, FakeLLM, body, client_of

TEXT = "".join(PIECES)
MESSAGES = [{"role": "user", "content": "hi"}]


class Running:
    """A server on a private port; `status` is its exit status."""

    def __init__(self, task: asyncio.Task[int], port: int) -> None:
        self.task = task
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    async def status(self) -> int:
        return await asyncio.wait_for(self.task, 20)


async def until(condition: Callable[[], bool], seconds: float = 10) -> float:
    """How long it took until `condition`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited too long"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


@contextlib.asynccontextmanager
async def served(llm: FakeLLM, settings: ServerSettings | None = None) -> AsyncIterator[Running]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Running(asyncio.ensure_future(serve(llm, listener, settings=settings or ServerSettings())), port)
    try:
        async with httpx.AsyncClient() as client:
            for _ in range(1000):
                with contextlib.suppress(httpx.ConnectError):
                    await client.get(f"{server.url}/v1/models")
                    break
                await asyncio.sleep(0.01)
        yield server
        if not server.task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            assert await server.status() == 0
    finally:
        server.task.cancel()
        await asyncio.gather(server.task, return_exceptions=True)


def raw_request(payload: bytes) -> bytes:
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(payload)}")
    return "\r\n".join([*head, "", ""]).encode() + payload


@pytest.mark.parametrize("stream", [False, True])
def test_official_async_client(llm: FakeLLM, stream: bool) -> None:
    async def main() -> None:
        async with served(llm) as server, openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            if stream:
                chunks = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
                )
                got = [chunk async for chunk in chunks]
                assert "".join(c.delta.content or "" for chunk in got for c in chunk.choices) == TEXT
                assert got[-1].usage.prompt_tokens_details.cached_tokens == 4
            else:
                answer = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, extra_body={"top_k": 5}
                )
                assert answer.choices[0].message.content == TEXT
                assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "t0"
                assert answer.usage.total_tokens == 9
                assert answer._request_id

    asyncio.run(main())


def test_official_sync_client(llm: FakeLLM) -> None:
    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
            assert answer.choices[0].message.content == TEXT
            llm.finish_reason = "stop"  # the helper refuses answers that were cut off
            with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as events:
                assert events.get_final_completion().choices[0].message.content == TEXT
            with pytest.raises(openai.BadRequestError) as bad:
                client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
            assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
            with pytest.raises(openai.NotFoundError) as missing:
                client.chat.completions.create(model="another", messages=MESSAGES)
            assert missing.value.code == "model_not_found"
            llm.fail_before, llm.error = 2, ImageError("the image is damaged")
            with pytest.raises(openai.APIError, match="the image is damaged"):
                list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))

    async def main() -> None:
        async with served(llm) as server:
            await asyncio.to_thread(use, server.url)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause_before", [0, 2])
def test_a_client_that_goes_away_stops_its_request_within_a_second(llm: FakeLLM, stream: bool, pause_before: int) -> None:
    llm.pause_before = pause_before

    async def main() -> None:
        async with served(llm) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw_request(json.dumps(body(stream=stream)).encode()))
            if stream and pause_before:
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await until(lambda: bool(llm.running))
            writer.close()
            assert await until(lambda: not llm.running) < 1
            assert len(llm.aborted) == 1
            llm.resume.set()
            async with httpx.AsyncClient() as client:  # and the next one is answered
                assert (await client.post(f"{server.url}/v1/chat/completions", json=body())).status_code == 200

    asyncio.run(main())


def test_a_client_that_goes_away_in_the_middle_of_its_body_disturbs_nobody(llm: FakeLLM) -> None:
    async def main() -> None:
        async with served(llm) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw_request(json.dumps(body()).encode())[:-5])
            await writer.drain()
            writer.close()
            async with httpx.AsyncClient() as client:
                assert (await client.post(f"{server.url}/v1/chat/completions", json=body())).status_code == 200
            assert len(llm.asked) == 1

    asyncio.run(main())


def test_the_head_of_a_stream_waits_for_the_first_token(llm: FakeLLM) -> None:
    llm.pause_before = 0

    async def main() -> None:
        async with served(llm) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw_request(json.dumps(body(stream=True)).encode()))
            await until(lambda: bool(llm.running))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(1), 0.2)
            llm.resume.set()
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()

    asyncio.run(main())


def test_a_signal_lets_an_answer_finish(llm: FakeLLM) -> None:
    llm.pause_before = 1

    async def main() -> None:
        async with served(llm) as server, httpx.AsyncClient(timeout=20) as client:
            answer = asyncio.ensure_future(client.post(f"{server.url}/v1/chat/completions", json=body()))
            await until(lambda: bool(llm.running))
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
            llm.resume.set()
            assert (await answer).json()["choices"][0]["message"]["content"] == TEXT
            assert await server.status() == 0

    asyncio.run(main())


def test_the_engines_death_ends_the_server_with_an_error(llm: FakeLLM) -> None:
    llm.pause_before = 2
    llm.fail_before = 2

    async def main() -> None:
        async with served(llm) as server, httpx.AsyncClient(timeout=20) as client:
            url = f"{server.url}/v1/chat/completions"
            full = asyncio.ensure_future(client.post(url, json=body()))
            stream = asyncio.ensure_future(client.post(url, json=body(stream=True)))
            await until(lambda: len(llm.running) == 2)
            llm.is_ready = False
            assert (await client.get(f"{server.url}/health")).status_code == 503
            llm.resume.set()
            reply = await full
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
            assert "engine_unavailable" in (await stream).text.split("\n\n")[-2]
            assert "[DONE]" not in (await stream).text
            assert await server.status() == 1

    asyncio.run(main())


def test_every_refusal_has_openais_shape_and_a_request_id(llm: FakeLLM) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            chat = "/v1/chat/completions"
            replies = {
                (404, "unknown_url"): await client.get("/nothing/here"),
                (405, "method_not_allowed"): await client.get(chat),
                (415, "unsupported_content_type"): await client.post(chat, data={"a": "b"}),
                (404, "model_not_found"): await client.post(chat, json=body(model="other")),
                (400, "invalid_json"): await client.post(chat, content=b"{"),
            }
            replies[404, "model_not_found "] = await client.get("/v1/models/other")
            replies[404, "unknown_url "] = await client.post(chat + "/", json=body())
            llm.is_ready = False
            replies[503, "engine_unavailable"] = await client.get("/health")
            for (status, code), reply in replies.items():
                assert reply.status_code == status
                assert reply.json()["error"]["code"] == code.strip()
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
                assert reply.headers["x-request-id"]
            assert replies[405, "method_not_allowed"].headers["allow"] == "POST"

    asyncio.run(main())


def test_a_bug_is_a_500_without_its_words(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("/home/me/secret.py at 0xdeadbeef")

    monkeypatch.setattr(llm, "stats", broken)

    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.get("/metrics")
            assert reply.status_code == 500
            assert reply.json()["error"] == {
                "message": "The server failed to answer this request",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
            assert reply.headers["x-should-retry"] == "false"
            assert reply.headers["x-request-id"]

    asyncio.run(main())


@pytest.mark.parametrize(("given", "kept"), [("trace-1", True), ("x" * 129, False), ("a b", False)])
def test_a_plain_request_id_is_kept(llm: FakeLLM, given: str, kept: bool) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.get("/health", headers={"x-request-id": given})
            assert (reply.headers["x-request-id"] == given) == kept

    asyncio.run(main())


def test_models_health_and_documentation(llm: FakeLLM) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            assert (await client.get("/health")).status_code == 200
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 128)
            assert (await client.get("/docs")).status_code == 200
            schema = (await client.get("/openapi.json")).json()
            assert "temperature" in schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]

    asyncio.run(main())


def test_start_up_lines(llm: FakeLLM, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> tuple[int, dict[str, dict[str, object]]]:
        with caplog.at_level("INFO", "mmv1"):
            async with served(llm) as server, httpx.AsyncClient(base_url=server.url) as client:
                return server.port, (await client.get("/openapi.json")).json()["paths"]

    port, paths = asyncio.run(main())
    assert f"http://127.0.0.1:{port}" in caplog.text
    documented = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    said = {message.removeprefix("Route: ") for message in caplog.messages if message.startswith("Route: ")}
    assert said == documented - {"GET /v1/models/{name}"} | {"GET /", "GET /docs"}
    assert "float32 on cpu" in caplog.text
    assert "KV cache size: 160 tokens (10 blocks of 16 tokens)" in caplog.text
    assert "Redis: no" in caplog.text
    assert "Maximum concurrency for 128 tokens per request: 1.25x" in caplog.text
