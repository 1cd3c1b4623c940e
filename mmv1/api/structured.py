"""What a request may say of the form of its answers: OpenAI's response_format, vLLM's structured_outputs and its older spellings,
guided_*. All mean a StructuredOutputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mmv1.errors import RequestError
from mmv1.types import StructuredOutputs

if TYPE_CHECKING:
    from mmv1.api.protocol import GenerationFields

GrammarText = Annotated[str, Meta(min_length=1, max_length=1 << 18)]
Schema = GrammarText | dict[str, Any] | bool
Choices = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(min_length=1, max_length=4096)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
BadWords = Annotated[list[Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\S")]], Meta(max_length=128)]


class TextFormat(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    pass


class JSONObjectFormat(msgspec.Struct, tag="json_object", tag_field="type", forbid_unknown_fields=True):
    pass


class NamedSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    schema: dict[str, Any] | bool
    name: Annotated[str, Meta(max_length=256)] | None = None
    description: str | None = None  # without effect, as the name
    strict: bool | None = None  # without effect: a schema is always followed


class JSONSchemaFormat(msgspec.Struct, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    json_schema: NamedSchema


ResponseFormat = TextFormat | JSONObjectFormat | JSONSchemaFormat


class StructuredOutputsField(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's."""

    json: Schema | None = None
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: Literal[True] | None = None


def to_structured_outputs(request: GenerationFields) -> StructuredOutputs | None:
    """Raises RequestError when a request asks for several forms, or for none where it should say which."""
    asked: list[StructuredOutputs] = []
    match request.response_format:
        case JSONSchemaFormat(json_schema):
            asked.append(StructuredOutputs(json=json_schema.schema, param="response_format"))
        case JSONObjectFormat():
            asked.append(StructuredOutputs(json_object=True, param="response_format"))
    given = request.structured_outputs
    if given is not None:
        choice = None if given.choice is None else tuple(given.choice)
        asked.append(
            StructuredOutputs(
                json=given.json, regex=given.regex, choice=choice, grammar=given.grammar, json_object=bool(given.json_object)
            )
        )
    if request.guided_json is not None:
        asked.append(StructuredOutputs(json=request.guided_json, param="guided_json"))
    if request.guided_regex is not None:
        asked.append(StructuredOutputs(regex=request.guided_regex, param="guided_regex"))
    if request.guided_choice is not None:
        asked.append(StructuredOutputs(choice=tuple(request.guided_choice), param="guided_choice"))
    if request.guided_grammar is not None:
        asked.append(StructuredOutputs(grammar=request.guided_grammar, param="guided_grammar"))
    if len(asked) > 1:
        names = " and ".join(each.param for each in asked)
        raise RequestError(f"an answer has one form: {names} do not go together", param=asked[1].param)
    return asked[0] if asked else None
