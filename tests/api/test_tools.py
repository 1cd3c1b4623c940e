"""Calls found in an answer's text, however it is cut; what a request says of tools; the answers that clients see."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmv1.api.chat import to_conversation
from mmv1.api.protocol import decode_chat_request
from mmv1.api.tools import ToolCallDelta, ToolCallParser, join_calls
from mmv1.errors import RequestError
from tests.api.fake_llm import FakeLLM, body, client_of, make_model_dir
from tests.api.test_chat import events_of


def read(pieces: list[str], **options: object) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    parser = ToolCallParser(**options)  # type: ignore[arg-type]
    content = ""
    deltas: list[ToolCallDelta] = []
    for i, piece in enumerate(pieces):
        text, news = parser.push(piece, last=i == len(pieces) - 1)
        content += text
        deltas += news
    calls = join_calls(deltas)
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.function.name, call.function.arguments) for call in calls]


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


NESTED = '{"a": [1, {"b": "}]{ \\" </tool_call> <tool_call>"}], "c": "é😀\\\\"}'
FOUND = [
    ("no call", "no call", []),
    (call("f", "{}"), "", [("f", "{}")]),
    ("Let me see.\n" + call("f", '{"x": 1}'), "Let me see.\n", [("f", '{"x": 1}')]),
    (call("f", NESTED), "", [("f", NESTED)]),
    (call("f", "{}") + "\n" + call("g", '{"y": null}') + "\n", "", [("f", "{}"), ("g", '{"y": null}')]),
    (call("f", "{}") + "\n Done.", "Done.", [("f", "{}")]),
    ('<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>', "", [("f", '{"x":1}')]),
    ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}, "id": 7}</tool_call>!', "!", [("f", '{"x": 1}')]),
    # Ends that a model forgets.
    ('<tool_call>{"name": "f", "arguments": {"x": 1}', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>!', "!", [("f", '{"x": 1}')]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}\n' + call("g", "{}"), "", [("f", '{"x": 1}'), ("g", "{}")]),
    # Broken off when the name has been sent.
    ('<tool_call>{"name": "f", "arguments": {"x": "ab', "", [("f", '{"x": "ab')]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1</tool_call>' + call("g", "{}"), "", [("f", '{"x": 1'), ("g", "{}")]),
]  # fmt: skip
NO_CALLS = [
    "<", "<tool_call", "a <tool_calls> b", "<tool_call>", "<tool_call>\n</tool_call>", "<tool_call>f(x)</tool_call>",
    "<tool_call>[1]</tool_call>", "<tool_call>{}</tool_call>", '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', '<tool_call>{"name": "f g", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>', '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f"]}}x',
    "</tool_call>", "<tool_call>}</tool_call>", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    "<tool_call>" + "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), FOUND, ids=range(len(FOUND)))
def test_calls_are_found(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read([text]) == (content, calls)
    assert read(list(text)) == (content, calls)


@pytest.mark.parametrize("text", NO_CALLS, ids=range(len(NO_CALLS)))
def test_what_is_no_call_is_text(text: str) -> None:
    assert read([text]) == (text, [])
    assert read(list(text)) == (text, [])


def test_a_call_after_one_that_is_none() -> None:
    assert read(["<tool_call>" + call("f", "{}")]) == ("<tool_call>", [("f", "{}")])


FRAGMENTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<", '{"name": "f", "arguments": ', '{"name"', '{"a": 1}', "{", "}", "[", "]", '"', "\\",
         "\n", " ", "x", '"arguments": {', call("f", '{"k": "v"}'), call("g", NESTED), '{"arguments": {}, "name": "h"}', "é😀"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@given(text=FRAGMENTS, data=st.data(), inside=st.booleans())
def test_any_cut_of_the_text_gives_the_same(text: str, data: st.DataObject, inside: bool) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read([*pieces, ""], inside=inside) == read([text], inside=inside)


@given(text=FRAGMENTS)
def test_without_a_call_no_character_is_lost(text: str) -> None:
    content, calls = read([text])
    assert calls or content == text


def test_the_name_comes_first_and_arguments_in_pieces() -> None:
    parser = ToolCallParser()
    assert parser.push('Hm <tool_call>\n{"name": "get') == ("Hm ", [])
    assert parser.push('_it", "arguments": ') == ("", [])
    _, (start, first) = parser.push('{"a": ')
    assert (start.index, start.type, start.function.name, start.function.arguments) == (0, "function", "get_it", "")
    assert str(start.id).startswith("call_")
    assert first.function.arguments == '{"a": '
    _, (second,) = parser.push('"<b')
    assert (second.index, second.function.arguments) == (0, '"<b')
    assert [delta.function.arguments for delta in parser.push('"}}\n</tool')[1]] == ['"}']
    assert parser.push("_call>", last=True) == ("", [])


def test_only_so_many_calls() -> None:
    text = call("f", "{}") + call("g", "{}") + "end"
    assert read(list(text), max_calls=1) == ("end", [("f", "{}")])


def test_an_answer_that_is_inside_a_call_from_its_start() -> None:
    assert read(['{"name": "f", "arguments": {"x": 1}}'], inside=True) == ("", [("f", '{"x": 1}')])
    assert read(["sorry"], inside=True) == ("sorry", [])


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}},
    {"type": "function", "function": {"name": "clock", "description": "the time", "strict": None}},
]
CALLING = ("Let me see. ", "<tool", '_call>\n{"name": "weather", ', '"arguments": {"city"', ': "Köln"}', "}\n</tool_call>",
           "\n<tool_call>\n", '{"name": "clock", "arguments": {}}', "\n</tool_call>")  # fmt: skip


def ask(model_dir: Path, pieces: tuple[str, ...] = CALLING, **fields: object) -> tuple[FakeLLM, dict[str, object]]:
    """The one answer: its choice, put together from events where it is a stream."""
    llm = FakeLLM(make_model_dir(model_dir), pieces=pieces)
    llm.finish_reason = "stop"

    async def main() -> str:
        async with client_of(llm) as client:
            reply = await client.post("/v1/chat/completions", json=body(**({"tools": TOOLS} | fields)))
            assert reply.status_code == 200, reply.text
            return reply.text

    text = asyncio.run(main())
    if not fields.get("stream"):
        (choice,) = json.loads(text)["choices"]
        return llm, choice
    message: dict[str, object] = {"content": None}
    calls: list[dict[str, object]] = []
    for chunk in events_of(text)[:-1]:
        (choice,) = chunk["choices"]  # type: ignore[index]
        delta = choice["delta"]
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for news in delta.get("tool_calls", ()):
            if "id" in news:
                assert news["index"] == len(calls) and news["function"]["arguments"] == ""
                calls.append({"id": news["id"], "type": news["type"], "function": dict(news["function"])})
            else:
                calls[news["index"]]["function"]["arguments"] += news["function"]["arguments"]  # type: ignore[index]
        finish_reason = choice["finish_reason"]
    if calls:
        message["tool_calls"] = calls
    return llm, {"message": message, "finish_reason": finish_reason}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_calls(tmp_path: Path, stream: bool) -> None:
    llm, choice = ask(tmp_path, stream=stream)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see. "  # type: ignore[index]
    calls = message["tool_calls"]  # type: ignore[index]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Köln"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    plain = {"type": "function", "function": {"name": "clock", "description": "the time"}}
    assert llm.asked[0][0].tools == [TOOLS[0], plain]  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_tool_calls_false_gives_the_first(tmp_path: Path, stream: bool) -> None:
    _, choice = ask(tmp_path, stream=stream, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]  # type: ignore[index]


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_choice_of_tools_the_text_is_untouched(tmp_path: Path, fields: dict[str, object], stream: bool) -> None:
    _, choice = ask(tmp_path, stream=stream, **fields)
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "".join(CALLING)  # type: ignore[index]
    assert "tool_calls" not in choice["message"]  # type: ignore[operator]


@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_call_is_content(tmp_path: Path, stream: bool) -> None:
    _, choice = ask(tmp_path, ("<tool_call>", "weather(Köln)", "</tool_call>"), stream=stream)
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "<tool_call>weather(Köln)</tool_call>"  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_a_demanded_call_is_a_grammar(tmp_path: Path, stream: bool, choice: object) -> None:
    llm, answered = ask(tmp_path, ('{"name": "clock", "argu', 'ments": {}}'), tool_choice=choice, stream=stream)
    (called,) = answered["message"]["tool_calls"]  # type: ignore[index]
    assert called["function"] == {"name": "clock", "arguments": "{}"}
    assert answered["message"]["content"] is None  # type: ignore[index]
    assert answered["finish_reason"] == ("tool_calls" if choice == "required" else "stop")  # as OpenAI's
    schema = llm.asked[0][1].structured_outputs.json
    shapes = schema["anyOf"] if choice == "required" else [schema]
    assert [shape["properties"]["name"]["enum"] for shape in shapes] == [["weather"], ["clock"]][-len(shapes) :]
    assert shapes[-1]["properties"]["arguments"] == {"type": "object"}
    assert all(shape["required"] == ["name", "arguments"] and not shape["additionalProperties"] for shape in shapes)


def with_definition(name: str, definition: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": {"$ref": "#/$defs/T", "$defs": {"T": definition}}}}


def test_definitions_of_tools_are_found_at_the_root(tmp_path: Path) -> None:
    one = {"type": "object"}
    tools = [with_definition("a", one), with_definition("b", one)]
    llm, _ = ask(tmp_path, ("{}",), tools=tools, tool_choice="required")
    schema = llm.asked[0][1].structured_outputs.json
    assert schema["$defs"] == {"T": one}
    assert schema["anyOf"][0]["properties"]["arguments"] == {"$ref": "#/$defs/T"}
    request = body(tools=[tools[0], with_definition("b", {"type": "array"})], tool_choice="required")
    llm = FakeLLM(tmp_path)

    async def main() -> None:
        async with client_of(llm) as client:
            reply = await client.post("/v1/chat/completions", json=request)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")

    asyncio.run(main())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "other"}}])
def test_a_choice_that_is_not_offered_is_refused(choice: object) -> None:
    tools = [] if choice == "required" else TOOLS
    with pytest.raises(RequestError) as caught:
        decode_chat_request(json.dumps(body(tools=tools, tool_choice=choice)).encode())
    assert caught.value.param == "tool_choice"


def past(arguments: str) -> list[dict[str, object]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]


def test_a_conversation_with_calls() -> None:
    request = decode_chat_request(json.dumps(body(messages=past('{"zone": "UTC"}'))).encode())
    _, assistant, tool = to_conversation(request.messages)
    function = {"name": "clock", "arguments": {"zone": "UTC"}}
    assert (assistant.content, list(assistant.tool_calls)) == ("", [{"id": "call_1", "type": "function", "function": function}])
    assert (tool.role, tool.content, tool.tool_call_id) == ("tool", "noon", "call_1")
    request = decode_chat_request(json.dumps(body(messages=past(""))).encode())
    assert to_conversation(request.messages)[1].tool_calls[0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["{", "[]", "1", "x", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    request = decode_chat_request(json.dumps(body(messages=past(arguments))).encode())
    with pytest.raises(RequestError) as caught:
        to_conversation(request.messages)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_end_in_the_beginning_of_a_call(tmp_path: Path, stream: bool) -> None:
    _, choice = ask(tmp_path, ("a <tool", "_ca"), stream=stream)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a <tool_ca", "stop")  # type: ignore[index]
