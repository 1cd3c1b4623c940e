"""Conformance: a server met with the official client, unchanged: sync, async, streams, tools, errors, retries, completions."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import mmv1
from mmv1.api.settings import ServerSettings
from tests.api.fake_llm import MODEL, PIECES, FakeLLM
from tests.api.test_server import served, until
from tests.integration.server import Server, serving
from tests.pictures import data_url
from tests.tool_model import WEATHER, make_tool_model

MESSAGES = [{"role": "user", "content": "hi"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai")
    with serving(make_tool_model(tiny_model_dir, folder / "model"), folder) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as connected:
        yield connected


def async_client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models(client: openai.OpenAI, server: Server) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, client.models.retrieve("tiny").id) == ("tiny", "model", "tiny")
    assert server.http.get(f"{server.url}/version").json() == {"version": mmv1.__version__}
    assert [server.http.request(method, f"{server.url}/ping").status_code for method in ("GET", "POST")] == [200, 200]


def test_full_and_streamed_sync_and_async_are_one_answer(client: openai.OpenAI, server: Server) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert whole.usage is not None and whole.usage.completion_tokens <= 8
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=MESSAGES, **with_usage, **GREEDY))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})
    assert whole._request_id

    async def both() -> list[str | None]:
        async with async_client(server) as client:
            full = await client.chat.completions.create(messages=MESSAGES, **GREEDY)
            events = await client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
            streamed = "".join([c.delta.content or "" async for chunk in events for c in chunk.choices])
            return [full.choices[0].message.content, streamed]

    assert asyncio.run(both()) == [whole.choices[0].message.content] * 2


def test_what_clients_send_without_need_is_accepted(client: openai.OpenAI) -> None:
    extras = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "reasoning_effort": "low"}
    extras |= {"verbosity": "low", "parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s", "seed": 1}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=3, extra_body={"ignore_eos": True}, **extras
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_a_demanded_call_and_what_is_said_of_it(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "temperature": 0, "tools": [WEATHER], "max_tokens": 200}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        answer = client.chat.completions.create(messages=MESSAGES, tool_choice=choice, **fields).choices[0]
        assert answer.finish_reason == reason and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Köln", "Paris")
    with client.chat.completions.stream(messages=MESSAGES, tool_choice="required", **fields) as events:
        final = events.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.arguments == call.function.arguments
    answered = [*MESSAGES, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(messages=answered, tools=[WEATHER], **GREEDY)
    assert after.usage is not None and after.choices[0].finish_reason in ("stop", "length")


def test_tools_may_be_left_alone(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], **GREEDY).choices
    assert choice.message.content is not None and choice.message.tool_calls is None
    without = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    shown = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], tool_choice="none", **GREEDY)
    assert shown.usage.prompt_tokens > without.usage.prompt_tokens


def test_completions(client: openai.OpenAI, server: Server) -> None:
    one = client.completions.create(prompt="Once upon", logprobs=2, **GREEDY)
    assert one.choices[0].logprobs is not None
    assert "".join(one.choices[0].logprobs.tokens).startswith(one.choices[0].text)
    assert one.choices[0].logprobs.text_offset[0] == 0 and len(one.choices[0].logprobs.top_logprobs[0]) in (2, 3)
    tokens = server.http.post(f"{server.url}/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    several = client.completions.create(prompt=[tokens, tokens], n=2, **GREEDY)
    assert [choice.text for choice in several.choices] == [one.choices[0].text] * 4
    chunks = list(client.completions.create(prompt="Once upon", stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text
    assert chunks[-1].choices[0].finish_reason == one.choices[0].finish_reason

    async def streamed() -> str:
        async with async_client(server) as client:
            events = await client.completions.create(prompt="Once upon", stream=True, **GREEDY)
            return "".join([chunk.choices[0].text async for chunk in events])

    assert asyncio.run(streamed()) == one.choices[0].text


def test_tokens_of_prompts_conversations_and_pictures(server: Server, client: openai.OpenAI) -> None:
    def tokenize(**fields: object) -> dict[str, object]:
        reply = server.http.post(f"{server.url}/tokenize", json=fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    got = tokenize(model="tiny", prompt="a b<|im_end|>", return_token_strs=True, add_special_tokens=True)
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])  # type: ignore[arg-type]
    assert got["token_strs"][-1] == "<|im_end|>"  # type: ignore[index]
    assert got["max_model_len"] == client.models.retrieve("tiny").max_model_len  # type: ignore[attr-defined]
    text = server.http.post(f"{server.url}/detokenize", json={"model": "tiny", "tokens": got["tokens"]}).json()
    assert text == {"prompt": "a b<|im_end|>"}
    assert tokenize(prompt="") == {"count": 0, "max_model_len": got["max_model_len"], "tokens": [], "token_strs": None}
    jpeg = picture()
    shown = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": jpeg}}, {"type": "text", "text": "?"}]}]
    for messages, tools in ((MESSAGES, None), (MESSAGES, [WEATHER]), (shown, None)):
        extra = {"tools": tools} if tools else {}
        answer = client.chat.completions.create(messages=messages, **extra, **GREEDY)  # type: ignore[arg-type]
        assert tokenize(messages=messages, **extra)["count"] == answer.usage.prompt_tokens
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": "a", "tools": [WEATHER]}, "tools"),
        ({"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ):
        reply = server.http.post(f"{server.url}/tokenize", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert server.http.post(f"{server.url}/tokenize", json={"model": "x", "prompt": "a"}).status_code == 404
    assert server.http.post(f"{server.url}/detokenize", json={"tokens": [2**31 - 1]}).json()["error"]["param"] == "tokens"


def picture() -> str:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (100, 60), "red").save(out, "JPEG")
    return data_url(out.getvalue(), "JPEG")


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    def raised(kind: type[openai.APIStatusError], **fields: object) -> tuple[str | None, str | None]:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**({"messages": MESSAGES} | GREEDY | fields))  # type: ignore[call-overload]
        assert caught.value.request_id
        return caught.value.param, caught.value.code

    bad, missing = openai.BadRequestError, openai.NotFoundError
    assert raised(bad, temperature=9) == ("temperature", "invalid_value")
    assert raised(bad, extra_body={"tempature": 1}) == ("tempature", "unknown_parameter")
    assert raised(bad, tool_choice="required") == ("tool_choice", "invalid_value")
    assert raised(bad, max_tokens=10**6) == ("max_tokens", "context_length_exceeded")
    video = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "http://x/v.mp4"}}]}]
    assert raised(bad, messages=video) == ("messages[0].content[0].type", "invalid_value")
    assert raised(missing, model="gpt") == ("model", "model_not_found")
    with pytest.raises(missing):
        client.models.retrieve("gpt")
    with pytest.raises(bad) as caught:
        client.completions.create(prompt="x", echo=True, **GREEDY)
    assert caught.value.param == "echo"
    with pytest.raises(missing) as caught_missing:
        client.files.list()
    assert caught_missing.value.code == "unknown_url"


def test_several_clients_at_once(server: Server) -> None:
    async def main() -> None:
        async with async_client(server) as client:
            asked = [client.chat.completions.create(messages=MESSAGES, n=1 + i % 2, **GREEDY) for i in range(12)]
            asked_too = [client.completions.create(prompt=["a", "b"], **GREEDY) for _ in range(6)]
            answers = await asyncio.gather(*asked, *asked_too)
            assert len({answer.choices[0].message.content for answer in answers[:12]}) == 1  # type: ignore[union-attr]
            assert len({tuple(choice.text for choice in answer.choices) for answer in answers[12:]}) == 1  # type: ignore[union-attr]

    asyncio.run(main())


def test_the_client_tries_again_what_a_full_server_refused(llm: FakeLLM) -> None:
    """A refusal says that it may be sent again, and when; the client does, and is answered."""
    llm.pause_before = 0

    async def main() -> None:
        async with served(llm, ServerSettings(max_queued_requests=1)) as server, httpx.AsyncClient() as plain:
            url = f"{server.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=2, timeout=60) as client:
                first = asyncio.ensure_future(client.chat.completions.create(model=MODEL, messages=MESSAGES))  # type: ignore
                await until(lambda: len(llm.running) == 1)
                refused = await plain.post(f"{url}/chat/completions", json={"model": MODEL, "messages": MESSAGES})
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                with pytest.raises(openai.RateLimitError):
                    await client.with_options(max_retries=0).completions.create(model=MODEL, prompt="x")
                second = asyncio.ensure_future(client.chat.completions.create(model=MODEL, messages=MESSAGES))  # type: ignore
                async with asyncio.timeout(20):  # until it has been refused too
                    while not re.search(r"admission_rejections_total.* 3\.0", (await plain.get(f"{server.url}/metrics")).text):
                        await asyncio.sleep(0.02)
                assert len(llm.asked) == 1 and not second.done()
                llm.resume.set()
                for answer in (await first, await second):
                    assert answer.choices[0].message.content == "".join(PIECES)

    asyncio.run(main())
