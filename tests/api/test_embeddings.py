"""/v1/embeddings as clients meet it: forms of input and of answers, refusals, and what a server without either model says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mmv1.api.server import serve
from mmv1.api.settings import ServerSettings
from mmv1.embedding.embedder import PictureInput, TextInput
from mmv1.errors import EmbedderDeadError, ImageError, RequestError
from tests.api.fake_embedder import EMBEDDING_MODEL, FakeEmbedder
from tests.api.fake_llm import MODEL, FakeLLM, body, client_of
from tests.api.test_metrics import scrape_once

URL = "https://example.org/a.png"
PICTURE = {"type": "image_url", "image_url": {"url": URL}}


@pytest.fixture
def embedder() -> FakeEmbedder:
    return FakeEmbedder()


def post(embedder: FakeEmbedder, **fields: object) -> httpx.Response:
    async def main() -> httpx.Response:
        async with client_of(None, embedder) as client:
            return await client.post("/v1/embeddings", json={"model": EMBEDDING_MODEL, **fields})

    return asyncio.run(main())


def ask(embedder: FakeEmbedder, **fields: object) -> dict[str, Any]:
    reply = post(embedder, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def test_the_answer_has_openais_form(embedder: FakeEmbedder) -> None:
    answer = ask(embedder, input=["ab", "abc"], user="me", dimensions=2, encoding_format="float")
    floats = struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert answer == {
        "object": "list",
        "model": EMBEDDING_MODEL,
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, floats]},
            {"object": "embedding", "index": 1, "embedding": [3.0, floats]},
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    (one,) = ask(embedder, input="ab", encoding_format="base64")["data"]
    assert base64.b64decode(one["embedding"]) == struct.pack("<2f", 2, 0.1)


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({"input": "a"}, [TextInput("a")]),
        ({"input": [""]}, [TextInput("", "input[0]")]),
        ({"input": ["a", {"type": "text", "text": "b"}]}, [TextInput("a", "input[0]"), TextInput("b", "input[1]")]),
        ({"input": [PICTURE, "a"]}, [PictureInput(URL, "input[0]"), TextInput("a", "input[1]")]),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, [PictureInput(URL, "messages[0].content[0]")]),
        ({"messages": [{"role": "user", "content": "a"}]}, [TextInput("a", "messages[0].content")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "input": None},
         [TextInput("a", "messages[0].content[0]")]),
        ({"input": [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]}, [PictureInput(URL, "input[0]")]),
    ],
)  # fmt: skip
def test_forms_of_input(embedder: FakeEmbedder, fields: dict[str, object], inputs: list[object]) -> None:
    ask(embedder, **fields)
    assert embedder.asked == [(inputs, False, b"")]


def test_what_is_passed_on(embedder: FakeEmbedder) -> None:
    ask(embedder, input="a", truncate_prompt_tokens=-1, cache_salt="mine")
    assert embedder.asked == [([TextInput("a")], True, b"mine")]


TWO = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({}, "input", "invalid_value", "either input or messages"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input", "invalid_value", "either input or messages"),
        ({"input": []}, "input", "invalid_value", "length >= 1"),
        ({"input": ["a"] * 2049}, "input", "invalid_value", "length <= 2048"),
        ({"input": [1, 2, 3]}, "input", "invalid_value", "token ids are not supported"),
        ({"input": [[1, 2], [3]]}, "input", "invalid_value", "token ids are not supported"),
        ({"input": 5}, "input", "invalid_type", "got `int`"),
        ({"input": [{"type": "video_url", "video_url": {"url": URL}}]}, "input[0].type", "invalid_value",
         "video_url parts are not supported"),
        ({"input": [{"type": "image_url", "image_url": {}}]}, "input[0].image_url.url", "missing_required_parameter", "required"),
        ({"input": [{"type": "image_url", "image_url": {"url": URL, "max_pixels": 5}}]}, "input[0].image_url.max_pixels",
         "unsupported_parameter", "one size"),
        ({"messages": TWO}, "messages", "invalid_value", "one picture or one text"),
        ({"messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "a"}]}]}, "messages", "invalid_value",
         "one picture or one text"),
        ({"input": "a", "dimensions": 3}, "dimensions", "unsupported_parameter", "have 2 numbers, and cannot be shortened"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value", "hex"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "invalid_value", "<= -1"),
        ({"input": "a", "colour": 5}, "colour", "unknown_parameter", "not a known"),
        ({"input": "a", "model": ""}, "model", "invalid_value", "length >= 1"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(
    embedder: FakeEmbedder, fields: dict[str, object], param: str, code: str, words: str
) -> None:
    error = refusal(post(embedder, **fields))
    assert (error["type"], error["code"]) == ("invalid_request_error", code), error
    assert error["param"] == param and words in error["message"]
    assert not embedder.asked


def test_failures_have_a_status_of_their_own(embedder: FakeEmbedder) -> None:
    embedder.error = ImageError("input[1]: the JPEG image is damaged", param="input[1]")
    assert refusal(post(embedder, input=["a", PICTURE]))["param"] == "input[1]"
    embedder.error = EmbedderDeadError("process 4711 is gone")
    reply = post(embedder, input="a")
    assert refusal(reply, 503)["code"] == "embedder_unavailable" and int(reply.headers["retry-after"]) > 0
    assert "4711" not in reply.text
    embedder.error = RuntimeError("0xdeadbeef")
    assert refusal(post(embedder, input="a"), 500)["code"] == "internal_error"


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def test_beside_a_language_model(llm: FakeLLM, embedder: FakeEmbedder) -> None:
    async def main() -> None:
        async with client_of(llm, embedder) as client:
            models = (await client.get("/v1/models")).json()["data"]
            assert [(card["id"], card["root"], card["max_model_len"]) for card in models] == [
                (MODEL, llm.config.model.path, 128), (EMBEDDING_MODEL, "fake-clip:weights", 77),
            ]  # fmt: skip
            assert (await client.get(f"/v1/models/{EMBEDDING_MODEL}")).json() == models[1]
            assert (await client.get("/v1/models/other")).status_code == 404
            assert (await client.post("/v1/chat/completions", json=body())).status_code == 200
            wrong = await client.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
            assert refusal(wrong, 404)["code"] == "model_not_found"
            assert (await client.get("/health")).status_code == (await client.get("/ping")).status_code == 200
            embedder.is_healthy = False
            assert (await client.get("/health")).status_code == 200  # chats go on, and it comes back
            llm.is_ready = False
            assert refusal(await client.get("/health"), 503)["code"] == "engine_unavailable"

    run(main)


def test_without_a_language_model(embedder: FakeEmbedder) -> None:
    async def main() -> None:
        async with client_of(None, embedder) as client:
            assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [EMBEDDING_MODEL]
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                error = refusal(await client.post(path, json=body()), 404)
                assert error["code"] == "no_such_model" and "--runner pooling" in error["message"]
            assert (await client.get("/health")).status_code == (await client.get("/version")).status_code == 200
            embedder.is_healthy = False
            assert refusal(await client.get("/health"), 503)["code"] == "embedder_unavailable"
            assert (await client.get("/")).status_code == 404
            assert "mmv1:embedding_requests_total" in (await client.get("/metrics")).text
            paths = (await client.get("/openapi.json")).json()["paths"]
            assert "/v1/embeddings" in paths and "/v1/chat/completions" not in paths

    run(main)


def test_without_an_embedding_model(llm: FakeLLM) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            error = refusal(await client.post("/v1/embeddings", json={"model": MODEL, "input": "a"}), 404)
            assert error["code"] == "no_such_model" and "--embedding-model NAME:WEIGHTS" in error["message"]
            assert "embedding_" not in (await client.get("/metrics")).text

    run(main)


def test_metrics_are_under_the_models_own_name(llm: FakeLLM, embedder: FakeEmbedder) -> None:
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(scrape_once(llm, embedder))
        for sample in family.samples if sample.labels["model_name"] == EMBEDDING_MODEL
    }  # fmt: skip
    assert samples == {
        "mmv1:embedding_requests_total": 1, "mmv1:embedding_texts_total": 2, "mmv1:embedding_images_total": 3,
        "mmv1:embedding_cache_hits_total": 4, "mmv1:embedding_cache_queries_total": 5, "mmv1:embedding_cache_bytes": 600,
        "mmv1:embedding_cache_capacity_bytes": 700, "mmv1:embedding_process_deaths_total": 8,
    }  # fmt: skip


def test_tenants_and_the_number_of_requests_that_wait(embedder: FakeEmbedder) -> None:
    async def main() -> None:
        settings = {"api_keys": ("sk-ann", "sk-bob"), "max_queued_requests_per_key": 1, "max_request_bytes": 200}
        async with client_of(None, embedder, **settings) as client:

            async def embed(key: str, **fields: object) -> httpx.Response:
                headers = {"authorization": f"Bearer {key}"}
                return await client.post("/v1/embeddings", json={"model": EMBEDDING_MODEL, **fields}, headers=headers)

            assert refusal(await client.post("/v1/embeddings", json={}), 401)["code"] == "invalid_api_key"
            assert refusal(await embed("sk-ann", input="a" * 200), 413)["code"] == "request_too_large"
            for key in ("sk-ann", "sk-bob"):
                await embed(key, input="a")
                await embed(key, input="a", cache_salt="mine")
            scopes = [scope for _, _, scope in embedder.asked]
            assert len(set(scopes)) == 4 and all(scopes)
            embedder.resume.clear()
            first = asyncio.ensure_future(embed("sk-ann", input="a"))
            while len(embedder.asked) < 5:
                await asyncio.sleep(0)
            reply = await embed("sk-ann", input="a")
            assert refusal(reply, 429)["code"] == "rate_limit_exceeded" and int(reply.headers["retry-after"]) > 0
            other = asyncio.ensure_future(embed("sk-bob", input="a"))
            while len(embedder.asked) < 6:
                await asyncio.sleep(0)
            embedder.resume.set()
            assert (await first).status_code == (await other).status_code == 200

    run(main)


def with_server(embedder: FakeEmbedder, use: Callable[[int, asyncio.Task[int]], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            settings = ServerSettings(shutdown_timeout_s=0.2)
            server = asyncio.create_task(serve(None, listener, settings=settings, embedder=embedder))
            await use(listener.getsockname()[1], server)
            if not server.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await server

    asyncio.run(main())


def test_the_official_client(embedder: FakeEmbedder) -> None:
    """Which asks for base64 unless told otherwise, and decodes it."""

    async def use(port: int, server: asyncio.Task[int]) -> None:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            for options in ({}, {"encoding_format": "float"}):
                answer = await client.embeddings.create(model=EMBEDDING_MODEL, input=["ab", "abc"], **options)
                assert [each.embedding for each in answer.data] == [[2.0, pytest.approx(0.1)], [3.0, pytest.approx(0.1)]]
                assert (answer.usage.prompt_tokens, answer.model) == (9, EMBEDDING_MODEL)
            answer = await client.embeddings.create(model=EMBEDDING_MODEL, input=[PICTURE, "a"])  # type: ignore[list-item]
            assert [each.embedding[0] for each in answer.data] == [-1, 1]
            with pytest.raises(openai.BadRequestError, match="token ids"):
                await client.embeddings.create(model=EMBEDDING_MODEL, input=[1, 2])
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.embeddings.create(model="other", input="a")

    with_server(embedder, use)


def test_a_client_that_goes_away_and_a_server_that_ends(embedder: FakeEmbedder) -> None:
    embedder.resume.clear()

    async def use(port: int, server: asyncio.Task[int]) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

            def embed() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/embeddings", json={"model": EMBEDDING_MODEL, "input": "a"}))

            gone = embed()
            while not embedder.asked:
                await asyncio.sleep(0.005)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            while not embedder.num_cancelled:
                await asyncio.sleep(0.005)
            waiting = embed()
            while len(embedder.asked) < 2:
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            assert refusal(await waiting, 503)["code"] == "shutting_down"
            assert await server == 0

    with_server(embedder, use)


def test_a_server_whose_pictures_cannot_be_processed_any_more_ends(embedder: FakeEmbedder) -> None:
    async def use(port: int, server: asyncio.Task[int]) -> None:
        embedder.is_alive = False
        assert await asyncio.wait_for(server, 10) == 1

    with_server(embedder, use)


def test_the_largest_answer_is_one_json_text(embedder: FakeEmbedder) -> None:
    answer = ask(embedder, input=["a"] * 2048)
    assert [each["index"] for each in answer["data"]] == list(range(2048)) and json.dumps(answer)
    embedder.error = RequestError("x", param="input")
    assert refusal(post(embedder, input="a"))["param"] == "input"
