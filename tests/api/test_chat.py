"""From a chat request to its answer: parameters and defaults, the full answer, the events, errors before and after the first."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mmv1.api.chat import SamplingDefaults, to_conversation, to_sampling_params
from mmv1.api.protocol import decode_chat_request
from mmv1.errors import ConfigError, ContextLengthError, EngineDeadError, EngineError, ImageError, RequestError
from mmv1.preprocess.image_settings import ImageSettings
from mmv1.preprocess.prompt import ImagePart, Message, TextPart
from mmv1.types import StructuredOutputs
from tests.api.fake_llm import PIECES, FakeLLM, body, client_of, make_model_dir

TEXT = "".join(PIECES)


def request_of(**fields: object):
    return decode_chat_request(json.dumps(body(**fields)).encode())


def post(llm: FakeLLM, **fields: object):
    async def main():
        async with client_of(llm) as client:
            return await client.post("/v1/chat/completions", json=body(**fields))

    return asyncio.run(main())


def events_of(text: str) -> list[object]:
    """The data of each server-sent event, decoded; "[DONE]" as it is."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [data if (data := line.removeprefix("data: ")) == "[DONE]" else json.loads(data) for line in lines]


def test_messages_become_a_conversation() -> None:
    request = request_of(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]},
            {"role": "assistant", "content": "b"},
        ]
    )
    place = "messages[1].content[1].image_url"
    settings = ImageSettings(min_param=f"{place}.min_pixels", max_param=f"{place}.max_pixels")
    assert to_conversation(request.messages) == [
        Message("system", "be brief"),
        Message("user", [TextPart("a"), ImagePart("data:,x", settings)]),
        Message("assistant", "b"),
    ]


def test_what_is_said_of_a_picture_goes_with_it() -> None:
    said = [{"detail": "low"}, {"min_pixels": 5, "max_pixels": 9}, {"detail": "high", "max_pixels": None}]
    request = request_of(
        messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x", **each}} for each in said]}
        ]
    )
    (message,) = to_conversation(request.messages)
    settings = [part.settings for part in message.content]
    assert [(s.detail, s.min_pixels, s.max_pixels) for s in settings] == [("low", None, None), (None, 5, 9), ("high", None, None)]
    assert settings[2].max_param == "messages[0].content[2].image_url.max_pixels"


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (None, (None, None)),
        ({}, (None, None)),
        ({"min_pixels": 5, "max_pixels": 9}, (5, 9)),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}}, (5, 9)),
        ({"size": {"longest_edge": 9}, "max_pixels": 7, "min_pixels": None}, (None, 7)),
    ],
)
def test_mm_processor_kwargs_reach_the_engine(llm: FakeLLM, kwargs: object, expected: object) -> None:
    assert post(llm, mm_processor_kwargs=kwargs).status_code == 200
    settings = llm.asked[0][2]["image_settings"]
    assert (settings.min_pixels, settings.max_pixels) == expected


def test_every_parameter_reaches_the_engine() -> None:
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "stop_token_ids": [4], "n": 2, "ignore_eos": True,
        "presence_penalty": 0.1, "frequency_penalty": -0.2, "repetition_penalty": 1.1, "skip_special_tokens": False,
        "include_stop_str_in_output": True, "min_tokens": 2, "logit_bias": {"7": -3.5}, "bad_words": ["no"],
        "guided_choice": ["a"], "allowed_token_ids": [1, 2],
    }  # fmt: skip
    request = request_of(**given, max_tokens=9, max_completion_tokens=8, stop="x", logprobs=True, top_logprobs=3)
    params = to_sampling_params(request, SamplingDefaults(), 100)
    del given["guided_choice"]
    given |= {"stop_token_ids": (4,), "logit_bias": {7: -3.5}, "bad_words": ("no",), "allowed_token_ids": (1, 2)}
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_tokens, params.stop, params.logprobs) == (8, ("x",), 3)
    assert params.structured_outputs == StructuredOutputs(choice=("a",), param="guided_choice")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True, param="response_format")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}, "strict": True}}},
            StructuredOutputs(json={"a": 1}, param="response_format"),
        ),
        ({"structured_outputs": {"json": '{"a": 1}'}}, StructuredOutputs(json='{"a": 1}')),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
        ({"guided_json": {"a": 1}}, StructuredOutputs(json={"a": 1}, param="guided_json")),
        ({"guided_regex": "a"}, StructuredOutputs(regex="a", param="guided_regex")),
        ({"guided_grammar": "a"}, StructuredOutputs(grammar="a", param="guided_grammar")),
    ],
)
def test_every_spelling_of_an_answers_form(said: dict[str, object], meant: StructuredOutputs | None) -> None:
    assert to_sampling_params(request_of(**said), SamplingDefaults(), 100).structured_outputs == meant


def test_two_forms_do_not_go_together() -> None:
    with pytest.raises(RequestError, match="guided_json and guided_regex do not go together"):
        to_sampling_params(request_of(guided_json={}, guided_regex="a"), SamplingDefaults(), 100)


def test_defaults_are_the_models_then_openais(tmp_path: Path) -> None:
    make_model_dir(tmp_path, temperature=0.25, top_k=20, repetition_penalty=None, do_sample=True)
    defaults = SamplingDefaults.of_model(str(tmp_path))
    params = to_sampling_params(request_of(), defaults, 100)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.25, 20, 1.0, 1.0)
    params = to_sampling_params(request_of(temperature=0, top_k=0, logprobs=True), defaults, 100)
    assert (params.temperature, params.top_k, params.logprobs) == (0.0, 0, 0)


def test_useless_model_defaults_are_refused_at_the_start(tmp_path: Path) -> None:
    make_model_dir(tmp_path, temperature="hot")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        SamplingDefaults.of_model(str(tmp_path))


def test_full_answer(llm: FakeLLM) -> None:
    reply = post(llm, n=2, priority=-3, cache_salt="s")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert int(reply.headers["content-length"]) == len(reply.content)
    answer = reply.json()
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4, "image_tokens": 3},
    }
    for index, choice in enumerate(answer["choices"]):
        assert choice["index"] == index
        assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"] is None
    assert llm.asked[0][2] == {"priority": -3, "cache_salt": "s", "image_settings": ImageSettings()}
    assert llm.aborted == []


def test_events(llm: FakeLLM) -> None:
    reply = post(llm, n=2, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events_of(reply.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 4, "image_tokens": 3}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, usage]}) == 1
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
        assert choices[-1]["finish_reason"] == "length"


def test_events_without_usage_say_nothing_of_it(llm: FakeLLM) -> None:
    *chunks, done = events_of(post(llm, stream=True).text)
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


def test_continuous_usage(llm: FakeLLM) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events_of(post(llm, stream=True, stream_options=options).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 4, 4]


def test_tokens_without_text_send_no_event_but_count(tmp_path: Path) -> None:
    llm = FakeLLM(make_model_dir(tmp_path), pieces=("", "", "x", ""))
    *chunks, usage, _ = events_of(post(llm, stream=True, stream_options={"include_usage": True}).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {"content": "x"}, {}]
    assert usage["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(llm: FakeLLM, stream: bool) -> None:
    reply = post(llm, stream=stream, logprobs=True, top_logprobs=2)
    if stream:
        events = events_of(reply.text)[:-1]
        choices = [choice for event in events for choice in event["choices"] if choice["logprobs"]]
        content = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    else:
        content = reply.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list(PIECES)
    assert [bytes(entry["bytes"]).decode() for entry in content] == list(PIECES)
    top = [{"token": "t0", "logprob": 0.0, "bytes": [116, 48]}, {"token": "t1", "logprob": -1.0, "bytes": [116, 49]}]
    assert all(entry["top_logprobs"] == top for entry in content)


ERRORS = [
    (ImageError("the image is damaged"), 400, "invalid_image", "messages"),
    (ContextLengthError("too long"), 400, "context_length_exceeded", "messages"),
    (EngineDeadError("process 4711 at 0xdeadbeef"), 503, "engine_unavailable", None),
    (EngineError("process 4711 at 0xdeadbeef"), 500, "internal_error", None),
    (ZeroDivisionError("/home/x.py"), 500, "internal_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "param"), ERRORS)
def test_an_error_before_the_first_token_has_its_status(llm, stream, error, status, code, param) -> None:
    llm.fail_before, llm.error = 0, error
    reply = post(llm, stream=stream)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    got = reply.json()["error"]
    assert (got["code"], got["param"]) == (code, param)
    assert "0xdeadbeef" not in reply.text
    assert "/home" not in reply.text
    assert ("retry-after" in reply.headers) == (status == 503)
    assert llm.running == set()


@pytest.mark.parametrize(("error", "status", "code", "param"), ERRORS)
def test_an_error_after_the_first_token_ends_the_events_without_done(llm, error, status, code, param) -> None:
    llm.fail_before, llm.error = 2, error
    reply = post(llm, stream=True)
    assert reply.status_code == 200
    events = events_of(reply.text)
    assert events[-1]["error"]["code"] == code
    assert "choices" not in events[-1]
    assert not any("error" in event for event in events[:-1])
    assert "0xdeadbeef" not in reply.text

    assert post(llm).status_code == status  # not streamed, it is never too late for a status


def test_concurrent_requests_keep_to_themselves(llm: FakeLLM) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            posts = [client.post("/v1/chat/completions", json=body(stream=i % 2 == 0, n=i % 3 + 1)) for i in range(60)]
            for i, reply in enumerate(await asyncio.gather(*posts)):
                if i % 2 == 0:
                    events = events_of(reply.text)[:-1]
                    texts = [c["delta"].get("content", "") for event in events for c in event["choices"] if c["index"] == i % 3]
                    assert "".join(texts) == TEXT
                else:
                    assert [c["message"]["content"] for c in reply.json()["choices"]] == [TEXT] * (i % 3 + 1)

    asyncio.run(main())
    assert llm.running == set()


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
def test_every_event_of_text_is_what_encoding_it_whole_gives(tmp_path: Path, options: object) -> None:
    """Only the text of an event is encoded anew, whatever there is in it and around it."""
    pieces = ("a", '"content":""', "\n\u2028\\", '{"choices":[]}', "\U0001f600", "end")
    llm = FakeLLM(make_model_dir(tmp_path), pieces=pieces)
    text = post(llm, stream=True, stream_options=options, n=2).text
    for index in range(2):
        events = [event for event in events_of(text) if event != "[DONE]" and event["choices"]]  # type: ignore[index]
        mine = [event for event in events if event["choices"][0]["index"] == index]  # type: ignore[index]
        assert [event["choices"][0]["delta"].get("content") for event in mine] == ["", *pieces]  # type: ignore[index]
        shapes = {json.dumps({**event, "choices": [{**event["choices"][0], "delta": 0}]}) for event in mine[1:-1]}  # type: ignore
        assert len(shapes) == 1
        assert list(mine[1]) == list(mine[-1]) and list(mine[1]["choices"][0]) == list(mine[-1]["choices"][0])[:-1]  # type: ignore
