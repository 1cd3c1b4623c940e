"""/v1/completions over scripted answers: prompts in all their forms, choices in order, its own logprobs, events, errors."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest

from mmv1.api.completions import decode_completion_request, to_prompts
from mmv1.engine.async_llm import RawPrompt
from mmv1.errors import ContextLengthError, EngineDeadError, RequestError
from tests.api.fake_llm import MODEL, PIECES, FakeLLM, client_of
from tests.api.test_chat import events_of

TEXT = "".join(PIECES)


def body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "hi", **fields}


def post(llm: FakeLLM, **fields: object) -> httpx.Response:
    async def main() -> httpx.Response:
        async with client_of(llm) as client:
            return await client.post("/v1/completions", json=body(**fields))

    return asyncio.run(main())


def refused(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        request = decode_completion_request(json.dumps(body(**fields)).encode())
        to_prompts(request.prompt)
    assert caught.value.status == 400
    return caught.value


def test_full_answer(llm: FakeLLM) -> None:
    reply = post(llm, max_tokens=9, temperature=0.5, stop=["x"], seed=3, priority=-1, cache_salt="s")
    answer = reply.json()
    assert reply.status_code == 200
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == MODEL
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length", "stop_reason": None}]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"], answer["usage"]["total_tokens"]) == (5, 4, 9)
    ((prompt, params, options),) = llm.asked
    assert prompt == RawPrompt("hi")
    assert (params.max_tokens, params.temperature, params.stop, params.seed) == (9, 0.5, ("x",), 3)
    assert (options["priority"], options["cache_salt"]) == (-1, "s")


def test_an_answer_has_sixteen_tokens_at_most_unless_told(llm: FakeLLM) -> None:
    post(llm)
    assert llm.asked[0][1].max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]]), (["a"], ["a"])],
)
def test_the_forms_of_a_prompt(llm: FakeLLM, prompt: object, prompts: list[object]) -> None:
    assert len(post(llm, prompt=prompt).json()["choices"]) == len(prompts)
    assert [asked[0].prompt for asked in llm.asked] == prompts  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_by_prompt_then_answer(llm: FakeLLM, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = post(llm, prompt=["a", "b", "c"], n=2, stream=stream, **options)
    if stream:
        *chunks, usage, done = events_of(reply.text)
        assert done == "[DONE]" and usage["choices"] == []  # type: ignore[index]
        texts = [""] * 6
        for chunk in chunks:
            assert chunk["usage"] is None and chunk["object"] == "text_completion"  # type: ignore[index]
            (choice,) = chunk["choices"]  # type: ignore[index]
            texts[choice["index"]] += choice["text"]
        last = {c["choices"][0]["index"]: c["choices"][0]["finish_reason"] for c in chunks}  # type: ignore[index]
        assert last == dict.fromkeys(range(6), "length")
    else:
        usage = reply.json()
        assert [choice["index"] for choice in usage["choices"]] == list(range(6))
        texts = [choice["text"] for choice in usage["choices"]]
    assert texts == [TEXT] * 6
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (15, 24)  # type: ignore[index]
    assert llm.running == set() and llm.aborted == []


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_in_this_endpoints_form(llm: FakeLLM, stream: bool) -> None:
    reply = post(llm, logprobs=2, stream=stream)
    replies = events_of(reply.text)[:-1] if stream else [reply.json()]
    got: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for each in replies:
        for name, values in each["choices"][0]["logprobs"].items():  # type: ignore[index]
            got[name] += values
    assert got["tokens"] == list(PIECES)
    assert got["token_logprobs"] == [-0.5] * 4
    assert got["text_offset"] == [0, 5, 7, 14]
    assert got["top_logprobs"][0] == {"Hello": -0.5, "t0": 0.0, "t1": -1.0}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
        ({"prompt": ["a", [1]]}, "prompt", "invalid_value"),
        ({"prompt": [[1], ["a"]]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
    ],
)
def test_what_is_refused(fields: dict[str, object], param: str, code: str) -> None:
    error = refused(**fields)
    assert error.code == code
    assert error.param is not None and re.split(r"[.\[]", error.param)[0] == param


def test_what_asks_for_nothing_is_accepted(llm: FakeLLM) -> None:
    fields = {"echo": False, "best_of": 1, "suffix": None, "logit_bias": {}, "user": "u", "add_special_tokens": True}
    assert post(llm, **fields).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_one_prompt_before_the_first_token(llm: FakeLLM, stream: bool) -> None:
    llm.fail_before, llm.error = 0, ContextLengthError("too long")
    reply = post(llm, prompt=["a", "b"], stream=stream)
    assert reply.status_code == 400
    assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == ("prompt", "context_length_exceeded")
    assert llm.running == set()


def test_an_error_later_ends_the_events_without_done_and_the_other_prompts(llm: FakeLLM) -> None:
    llm.fail_before, llm.error = 2, EngineDeadError("process 4711 is gone")
    reply = post(llm, prompt=["a", "b"], stream=True)
    assert reply.status_code == 200
    *_, last = events_of(reply.text)
    assert last["error"]["code"] == "engine_unavailable"  # type: ignore[index]
    assert llm.running == set()
    assert post(llm).status_code == 503


def test_a_client_that_goes_away_ends_all_its_prompts(llm: FakeLLM) -> None:
    llm.pause_before = 1

    async def main() -> None:
        from mmv1.api.chat import SamplingDefaults
        from mmv1.api.completions import CompletionAnswer
        from mmv1.api.metrics import Metrics

        metrics = Metrics("m", llm.stats, llm.preprocessor.stats, llm.preprocessor.timings)
        request = decode_completion_request(json.dumps(body(prompt=["a", "b", "c"], stream=True)).encode())
        events = CompletionAnswer(llm, request, SamplingDefaults(), metrics).events()  # type: ignore[arg-type]
        await anext(events)
        while len(llm.running) < 3:
            await asyncio.sleep(0)
        await events.aclose()
        assert llm.running == set() and len(llm.aborted) == 3

    asyncio.run(main())
