"""Tools, in the form called Hermes: what a request says of them, and the calls found in an answer's text.

The chat template shows the tools to the model, which writes each call as `<tool_call>{"name": "f", "arguments": {}}</tool_call>`.
A call's name and arguments are given out as they come. What is not such an object is no call and stays text of the answer.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mmv1.errors import RequestError

_BEGIN, _END = "<tool_call>", "</tool_call>"
_NAME = "[a-zA-Z0-9_.-]{1,64}"
_HEADER = re.compile(rf'\s*\{{\s*"name"\s*:\s*"(?P<name>{_NAME})"\s*,\s*"arguments"\s*:\s*(?=\{{)')
_AFTER_CALL = re.compile(f"{_END}|(?={_BEGIN})")

FunctionName = Annotated[str, Meta(pattern=f"^{_NAME}$")]


# ---- requests ----


class FunctionDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None  # without effect under tool_choice "auto"


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: FunctionName


class NamedToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName
    arguments: str  # JSON


class PastToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call of an earlier turn, as it was answered."""

    id: Annotated[str, Meta(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # comes back from those who put it together from deltas


def as_template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates print them: what the request said of them, and nothing else."""
    shown = []
    for tool in tools:
        function = {name: value for name, value in msgspec.structs.asdict(tool.function).items() if value is not None}
        shown.append({"type": "function", "function": function})
    return shown


def as_template_call(call: PastToolCall, param: str) -> dict[str, Any]:
    """A call of an earlier turn as chat templates print it. Raises RequestError for arguments that are no JSON object."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{param}.function.arguments"
        raise RequestError(f"{param}: must be a JSON object, as text", param=param)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def check_tool_choice(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raises RequestError for a choice that these tools do not offer."""
    if choice is None or choice in ("none", "auto"):
        return
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in {tool.function.name for tool in tools}:
        raise RequestError(f"tool_choice: there is no tool {choice.function.name}", param="tool_choice")


def forced_call_schema(tools: Sequence[Tool], choice: ToolChoice | None) -> dict[str, Any] | None:
    """A JSON schema of the one call that `choice` asks for; None where the model is free. Raises RequestError for tools with
    different definitions under one name."""
    if choice is None or choice in ("none", "auto"):
        return None
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for tool in tools:
        name = tool.function.name
        if isinstance(choice, NamedToolChoice) and name != choice.function.name:
            continue
        parameters = dict(tool.function.parameters or {"type": "object"})
        lifted = parameters.pop("$defs", {})  # which "#/$defs/NAME" are looked for at the root
        for key, definition in lifted.items() if isinstance(lifted, dict) else ():
            if definitions.setdefault(key, definition) != definition:
                raise RequestError(f"tools: two of them define {key[:64]}, and not the same", param="tools")
        properties = {"name": {"type": "string", "enum": [name]}, "arguments": parameters}
        calls.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


# ---- answers ----


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """What is new in one call: first its id, type and name, then its arguments piece by piece."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


def join_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """One answer's deltas, put together."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.index == len(calls):
            calls.append(ToolCall(id=str(delta.id), function=FunctionCall(str(delta.function.name), "")))
        calls[delta.index].function.arguments += delta.function.arguments or ""
    return calls


class _Bracketed:
    """Follows one JSON object through growing text, by its brackets and strings alone."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._after_backslash = False
        self.is_whole = False

    def end(self, text: str) -> int | None:
        """None: all of `text` is the object's. Else where it ends: after its last bracket (`is_whole`), or before a character
        that cannot be there."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._after_backslash:
                    self._after_backslash = False
                elif character == "\\":
                    self._after_backslash = True
                else:
                    self._in_string = character != '"'
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_whole = self._depth == 0
                    return place + 1 if self.is_whole else place
            elif character == "<" or (self._depth == 0 and not character.isspace()):
                return place
            else:
                self._in_string = character == '"'
        return None


class ToolCallParser:
    """Finds the calls in one answer's text, however it is cut into pieces.

    `inside`: the answer begins as if `<tool_call>` had been read (a grammar made the model write a call). `max_calls`: later
    ones are dropped. Whitespace after a call is no text, and whatever stands between a call's arguments and its end neither. A
    call of which the arguments break off is given as far as they go: they have been sent.
    """

    def __init__(self, *, inside: bool = False, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._max_calls = max_calls
        self._rest = ""  # not consumed yet
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._step = self._read_text
        if inside:
            self._begin_call("")

    def push(self, piece: str, *, last: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """The text and the news of calls that are certain now; everything, with the `last` piece."""
        self._rest += piece
        while self._step(last):
            pass
        content, self._content = "".join(self._content), []
        deltas, self._deltas = self._deltas, []
        return content, [delta for delta in deltas if self._max_calls is None or delta.index < self._max_calls]

    # Each step consumes what it can of `_rest` and returns whether another one has been set, to go on with.

    def _read_text(self, last: bool) -> bool:
        before, found, after = self._rest.partition(_BEGIN)
        keep = 0 if found or last else next((n for n in range(len(_BEGIN) - 1, 0, -1) if before.endswith(_BEGIN[:n])), 0)
        self._content.append(before[: len(before) - keep])
        self._rest = after if found else before[len(before) - keep :]
        if found:
            self._begin_call(_BEGIN)
        return bool(found)

    def _begin_call(self, opening: str) -> None:
        self._opening, self._call = opening, ""  # kept: if it turns out to be no call, it is text
        self._object = _Bracketed()
        self._step = self._read_call

    def _read_call(self, last: bool) -> bool:
        """Up to the arguments if they come after the name, else the whole object."""
        piece, self._rest = self._rest, ""
        if header := _HEADER.match(self._call + piece):
            self._rest = (self._call + piece)[header.end() :]
            self._start_call(header["name"])
            return True
        end = self._object.end(piece)
        self._call += piece[:end]
        if end is None:
            if last:
                self._content.append(self._opening + self._call)
            return False
        self._rest = piece[end:]
        call = _parse_call(self._call) if self._object.is_whole else None
        if call is None:
            self._content.append(self._opening + self._call)
            self._step = self._read_text
        else:
            self._start_call(call.name)
            self._rest = call.arguments + self._rest
        return True

    def _start_call(self, name: str) -> None:
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        self._deltas.append(ToolCallDelta(self.num_calls, FunctionDelta(name, ""), call_id, "function"))
        self.num_calls += 1
        self._object = _Bracketed()
        self._step = self._read_arguments

    def _read_arguments(self, last: bool) -> bool:
        end = self._object.end(self._rest)
        if arguments := self._rest[:end]:
            self._deltas.append(ToolCallDelta(self.num_calls - 1, FunctionDelta(arguments=arguments)))
        self._rest = "" if end is None else self._rest[end:]
        self._step = self._read_arguments if end is None else self._skip_to_end
        return end is not None

    def _skip_to_end(self, last: bool) -> bool:
        found = _AFTER_CALL.search(self._rest)
        self._rest = self._rest[found.end() :] if found else self._rest[1 - len(_END) :]
        self._step = self._skip_space if found else self._skip_to_end
        return found is not None

    def _skip_space(self, last: bool) -> bool:
        self._rest = self._rest.lstrip()
        if self._rest:
            self._step = self._read_text
        return bool(self._rest)


def _parse_call(text: str) -> FunctionCall | None:
    """A call whose name does not come right before its arguments, or which has none. None: it is no call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not re.fullmatch(_NAME, name) or not isinstance(arguments, dict):
        return None
    return FunctionCall(name, json.dumps(arguments))
