"""What a request may say: every field with wrong types and ranges is a 400 that names the field; no other status, no leak."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from mmv1.api.protocol import MAX_BODY_BYTES, ChatCompletionRequest, decode_chat_request
from mmv1.errors import RequestError
from tests.api.fake_llm import FakeLLM, body, client_of

LEAK = re.compile(r"0x[0-9a-f]{6,}|/usr/|/home/|/tmp/|Traceback|site-packages|<_io\.|\.py\b", re.IGNORECASE)

NOT_A_STRING = [1, True, ["x"], {"a": 1}, 1.5]
NOT_AN_INT = ["1", True, 1.5, [1], {}]
NOT_A_NUMBER = ["1", True, [1], {}]
NOT_A_BOOL = ["yes", 1, 0, [True], {}]

A_TOOLBOX = [{"type": "function", "function": {"name": "f"}}]
BAD = {
    "model": [*NOT_A_STRING, None, ""],
    "messages": ["hi", 1, {}, None, []],
    "max_tokens": [*NOT_AN_INT, 0, -1, 2**31, 10**40],
    "max_completion_tokens": [*NOT_AN_INT, 0, -1, 2**31],
    "temperature": [*NOT_A_NUMBER, -0.1, 2.1],
    "top_p": [*NOT_A_NUMBER, 0, 1.1, -1],
    "top_k": [*NOT_AN_INT, -2, 2**31],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "seed": [*NOT_AN_INT, 2**63, -(2**63) - 1],
    "stop": [1, True, {}, "", [""], [1], ["a"] * 17, "x" * 257],
    "stop_token_ids": [1, "1", [-1], ["1"], [True], [1.5], [2**31], [100]],  # the vocabulary has 100
    "n": [*NOT_AN_INT, 0, 17],
    "ignore_eos": NOT_A_BOOL,
    "presence_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1, 2.1],
    "logprobs": [*NOT_A_BOOL, 5],
    "top_logprobs": [*NOT_AN_INT, -1, 21, 1],  # 1: without logprobs
    "stream": NOT_A_BOOL,
    "stream_options": [1, "x", [], True, {}],  # {}: without stream
    "priority": [*NOT_AN_INT, 2**31],
    "cache_salt": [*NOT_A_STRING, "", "x" * 257],
    "skip_special_tokens": NOT_A_BOOL,
    "include_stop_str_in_output": NOT_A_BOOL,
    "min_tokens": [*NOT_AN_INT, -1, 2**31],
    "logit_bias": [1, [], {"x": 1}, {"-1": 1}, {"1": 101}, {"1": -100.5}, {"1": "2"}],
    "bad_words": ["x", [1], [""], [" "], ["x" * 257], ["a"] * 129],
    "allowed_token_ids": [1, [], ["1"], [-1], [1.5], [2**31]],
    "response_format": [
        *("text", 1, {"type": "xml"}, {"type": "json_schema", "json_schema": "x"}),
        {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
    ],
    "structured_outputs": [1, "x", {"json": 1}, {"regex": ""}, {"choice": []}, {"choice": "a"}, {"json_object": False}],
    "guided_json": [1, [], ""],
    "guided_regex": [*NOT_A_STRING, ""],
    "guided_choice": ["a", [], [1], [""]],
    "guided_grammar": [*NOT_A_STRING, ""],
    "mm_processor_kwargs": [
        *("x", 1, [], True),
        *({name: value} for name in ("min_pixels", "max_pixels") for value in [*NOT_AN_INT, 0, -1, 2**63, 10**40]),
        {"size": 784},
        {"size": {"shortest_edge": "784"}},
        {"size": {"longest_edge": 0}},
    ],
    "chat_template_kwargs": ["x", 1, [], True],
    "user": [*NOT_A_STRING, "x" * 257],
    "safety_identifier": NOT_A_STRING,
    "prompt_cache_key": NOT_A_STRING,
    "prompt_cache_retention": NOT_A_STRING,
    "service_tier": NOT_A_STRING,
    "store": NOT_A_BOOL,
    "metadata": ["x", 1, [], {"a": 1}],
    "parallel_tool_calls": NOT_A_BOOL,
    "tools": ["x", 1, {}, ["x"], [{"type": "f", "function": {"name": "f"}}], A_TOOLBOX * 129,
              [{"type": "function", "function": {"name": "a b"}}],
              [{"type": "function", "function": {"name": "f", "parameters": 1}}]],
    "tool_choice": [1, "some", [], {"type": "f", "function": {"name": "f"}},
                    "required", {"type": "function", "function": {"name": "f"}}],  # the last two: without tools
    "reasoning_effort": NOT_A_STRING,
    "verbosity": NOT_A_STRING,
}  # fmt: skip
NEVER_WRONG = {"prediction"}
UNSUPPORTED = {
    "functions": [[{"name": "f"}]],
    "function_call": ["auto"],
    "modalities": [["text", "audio"]],
    "audio": [{"voice": "x"}],
    "web_search_options": [{}],
    "moderation": [{}],
    "best_of": [2, True],
    "echo": [True],
    "prompt_logprobs": [1],
    "length_penalty": [1.1],
    "use_beam_search": [True],
    "chat_template": ["x"],
    "add_generation_prompt": [False],
    "continue_final_message": [True],
}
HARMLESS = {
    "tools": A_TOOLBOX,
    "tool_choice": "none",
    "reasoning_effort": "low",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "response_format": {"type": "text"},
    "logit_bias": {},
    "modalities": ["text"],
    "parallel_tool_calls": False,
    "user": "u",
    "store": False,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "best_of": 1,
    "stop": [],
    "top_k": -1,
    "seed": -(2**63),
    "temperature": 0,
}


A_TEXT = {"type": "text", "text": "x"}


def user_says(*parts: object) -> list[object]:
    return [{"role": "user", "content": list(parts)}]


def user_shows(**image_url: object) -> list[object]:
    return user_says({"type": "image_url", "image_url": image_url})


def calls(**function: object) -> list[object]:
    return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", **function}}]


CALLS = calls()
BAD_MESSAGES = [
    ("messages[0]", ["hi"], "invalid_type"),
    ("messages[0].role", [{"role": "robot", "content": "x"}], "invalid_value"),
    ("messages[0].role", [{"role": 1, "content": "x"}], "invalid_type"),
    ("messages[0].role", [{"content": "x"}], "missing_required_parameter"),
    ("messages[0].content", [{"role": "user"}], "missing_required_parameter"),
    ("messages[0].content", [{"role": "user", "content": None}], "missing_required_parameter"),
    ("messages[0].content", [{"role": "user", "content": 5}], "invalid_type"),
    ("messages[0].content", [{"role": "user", "content": []}], "invalid_value"),
    ("messages[0].content", user_says(*[{"type": "text", "text": "x"}] * 257), "invalid_value"),
    ("messages[0].surprise", [{"role": "user", "content": "x", "surprise": 1}], "unknown_parameter"),
    ("messages[0].name", [{"role": "user", "content": "x", "name": 1}], "invalid_type"),
    ("messages[0].tool_calls[0].function", [{"role": "assistant", "tool_calls": [{}]}], "missing_required_parameter"),
    ("messages[0].tool_calls", [{"role": "user", "content": "x", "tool_calls": CALLS}], "invalid_value"),
    ("messages[0].tool_calls[0].function.name", [{"role": "assistant", "tool_calls": calls(name="")}], "invalid_value"),
    ("messages[0].tool_calls[0].function.arguments", [{"role": "assistant", "tool_calls": calls(arguments={})}], "invalid_type"),
    ("messages[0].content", [{"role": "tool", "tool_call_id": "1"}], "missing_required_parameter"),
    ("messages[0].content", [{"role": "assistant", "tool_calls": []}], "missing_required_parameter"),
    ("messages[0].tool_call_id", [{"role": "tool", "content": "x", "tool_call_id": 1}], "invalid_type"),
    ("messages[0].audio", [{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "unsupported_parameter"),
    ("messages[0].content[0]", user_says("text"), "invalid_type"),
    ("messages[0].content[0].type", user_says({"text": "x"}), "missing_required_parameter"),
    ("messages[0].content[0].type", user_says({"type": "input_audio"}), "invalid_value"),
    ("messages[0].content[0].text", user_says({"type": "text"}), "missing_required_parameter"),
    ("messages[0].content[0].text", user_says({"type": "text", "text": 1}), "invalid_type"),
    ("messages[0].content[0].image_url", user_says({"type": "image_url"}), "missing_required_parameter"),
    ("messages[0].content[1].image_url", user_says(A_TEXT, {"type": "image_url", "image_url": 1}), "invalid_type"),
    ("messages[0].content[0].image_url", user_says({"type": "image_url", "image_url": "data:"}), "invalid_type"),
    ("messages[0].content[0].image_url.url", user_shows(), "missing_required_parameter"),
    ("messages[0].content[0].image_url.url", user_shows(url=""), "invalid_value"),
    ("messages[0].content[0].image_url.detail", user_shows(url="x", detail="tiny"), "invalid_value"),
    ("messages[0].content[0].image_url.detail", user_shows(url="x", detail=1), "invalid_type"),
    ("messages[0].content[0].image_url.min_pixels", user_shows(url="x", min_pixels=0), "invalid_value"),
    ("messages[0].content[0].image_url.max_pixels", user_shows(url="x", max_pixels="9"), "invalid_type"),
    ("messages[0].content[0].image_url.max_pixels", user_shows(url="x", max_pixels=True), "invalid_type"),
    ("messages[0].content[0].image_url.max_pixel", user_shows(url="x", max_pixel=9), "unknown_parameter"),
    ("messages[0].content[0].uuid", user_says({"type": "text", "text": "x", "uuid": "1"}), "unknown_parameter"),
    ("messages", [{"role": "user", "content": "x"}] * 2049, "invalid_value"),
]  # fmt: skip


def refused(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode_chat_request(raw)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 1000
    return caught.value


def test_every_field_is_tried() -> None:
    assert set(BAD) | set(UNSUPPORTED) | NEVER_WRONG == set(ChatCompletionRequest.__struct_fields__)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_wrong_value_is_a_400_that_names_the_field(llm: FakeLLM, field: str, value: object) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.post("/v1/chat/completions", json=body(**{field: value}))
            error = reply.json()["error"]
            assert reply.status_code == 400, error
            assert set(error) == {"message", "type", "param", "code"}
            assert re.split(r"[.\[]", error["param"])[0] == field
            assert error["type"] == "invalid_request_error"
            assert error["code"] in ("invalid_type", "invalid_value")
            assert not LEAK.search(reply.text)
        assert llm.asked == []

    asyncio.run(main())


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in UNSUPPORTED.items() for value in values])
def test_what_is_not_built_is_refused(field: str, value: object) -> None:
    error = refused(json.dumps(body(**{field: value})).encode())
    assert (error.param, error.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize(("param", "messages", "code"), BAD_MESSAGES)
def test_a_wrong_message_is_named_by_its_place(param: str, messages: list[object], code: str) -> None:
    error = refused(json.dumps(body(messages=messages)).encode())
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"fps": 2}, "mm_processor_kwargs.fps"),
        ({"min_pixels": 5, "do_resize": False}, "mm_processor_kwargs.do_resize"),
        ({"size": {"height": 5}}, "mm_processor_kwargs.size.height"),
    ],
)
def test_an_unknown_processor_setting_is_named(kwargs: dict[str, object], param: str) -> None:
    error = refused(json.dumps(body(mm_processor_kwargs=kwargs)).encode())
    assert (error.param, error.code) == (param, "unknown_parameter")


def test_what_is_said_of_a_picture_is_accepted() -> None:
    details = [{"detail": detail} for detail in ("low", "high", "auto", None)]
    for said in (*details, {}, {"detail": "low", "min_pixels": 1, "max_pixels": 2}, {"min_pixels": None}):
        decode_chat_request(json.dumps(body(messages=user_shows(url="x", **said))).encode())


def test_harmless_fields_and_nulls_are_accepted() -> None:
    decode_chat_request(json.dumps(body(**HARMLESS)).encode())
    optional = [name for name in ChatCompletionRequest.__struct_fields__ if name not in ("model", "messages")]
    request = decode_chat_request(json.dumps(body(**dict.fromkeys(optional))).encode())
    assert all(getattr(request, name) is None for name in optional)


def test_an_assistant_message_of_the_official_client_can_be_sent_back() -> None:
    dump = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    decode_chat_request(json.dumps(body(messages=[{"role": "user", "content": "x"}, dump])).encode())


def test_unknown_and_missing_fields() -> None:
    error = refused(json.dumps(body(temprature=1)).encode())
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    error = refused(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert (error.param, error.code) == ("model", "missing_required_parameter")


GOOD = json.dumps(body())
NOT_JSON = [
    b"",
    b"{",
    b"\x00",
    GOOD.encode("utf-16"),
    GOOD.replace("hi", "\udc80").encode("utf-8", "surrogatepass"),
    GOOD.replace("hi", "\\ud800").encode(),
    GOOD.encode().replace(b"hi", b"\xff"),
    GOOD.encode() + b" x",
    GOOD.encode().replace(b"}]", b"}],\"temperature\": NaN"),
    GOOD.encode().replace(b"}]", b"}],\"temperature\": Infinity"),
    GOOD.encode().replace(b"}]", b"}],\"audio\": " + b"[" * 100_000 + b"]" * 100_000),
]


@pytest.mark.parametrize("raw", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_no_json_is_a_400(raw: bytes) -> None:
    error = refused(raw)
    assert (error.code, error.param) == ("invalid_json", None)
    assert not LEAK.search(str(error))


@pytest.mark.parametrize(("raw", "param"), [(b"[]", None), (b"null", None), (b'"x"', None)])
def test_a_body_that_is_no_object(raw: bytes, param: str | None) -> None:
    assert refused(raw).code == "invalid_type"


def test_a_number_past_every_range_is_named() -> None:
    error = refused(GOOD.encode().replace(b"}]", b"}],\"temperature\": 1e999"))
    assert (error.param, error.code) == ("temperature", "invalid_value")


def test_a_huge_wrong_value_is_not_echoed_whole() -> None:
    refused(json.dumps(body(messages=[{"role": "x" * 10_000_000, "content": "x"}])).encode())
    refused(json.dumps(body(**{"x" * 10_000_000: 1})).encode())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({}, 200),
    ],
)
def test_content_types(llm: FakeLLM, headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.post("/v1/chat/completions", content=GOOD.encode(), headers=headers)
            assert reply.status_code == status
            if status != 200:
                assert reply.json()["error"]["code"] == "unsupported_content_type"

    asyncio.run(main())


def test_a_body_past_the_limit_is_refused(llm: FakeLLM) -> None:
    piece = b" " * (1 << 20)
    count = MAX_BODY_BYTES // len(piece) + 1

    async def pieces():
        for _ in range(count):
            yield piece

    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.post("/v1/chat/completions", content=pieces())
            assert reply.status_code == 413
            assert reply.json()["error"]["code"] == "request_too_large"

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["video_url", "input_audio", "audio_url", "file", "image"])
def test_other_parts_are_refused_in_words(kind: str) -> None:
    error = refused(json.dumps(body(messages=user_says({"type": kind, kind: {"url": "x"}}))).encode())
    assert error.param == "messages[0].content[0].type"
    assert f"{kind} parts are not supported by this server" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": A_TOOLBOX, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    ],
)
def test_a_tool_without_a_name_is_refused(fields: dict[str, object], param: str) -> None:
    error = refused(json.dumps(body(**fields)).encode())
    assert (error.param, error.code) == (param, "missing_required_parameter")
