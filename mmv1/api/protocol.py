"""The chat API's JSON, both ways, as msgspec structs: what a request may say, and the shapes of answers, chunks and errors.

Every field is checked for type and range while it is decoded, and the first fault becomes a RequestError whose `param` names
the field. Fields known to clients fall in three groups: built, accepted without effect (they change no answer), and refused
(they would change the answer and are not built). Any other name is refused too: a misspelt option is never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mmv1.api.settings import DEFAULT_MAX_REQUEST_BYTES
from mmv1.api.structured import (
    BadWords,
    Choices,
    GrammarText,
    LogitBias,
    ResponseFormat,
    Schema,
    StructuredOutputsField,
    TokenId,
)
from mmv1.api.tools import PastToolCall, Tool, ToolCall, ToolCallDelta, ToolChoice, check_tool_choice
from mmv1.errors import EmbedderDeadError, EngineDeadError, RequestError, ShuttingDownError
from mmv1.preprocess.image_settings import PictureSettings, ProcessorKwargs

MAX_BODY_BYTES = DEFAULT_MAX_REQUEST_BYTES
_INT32_MAX = 2**31 - 1

ShortString = Annotated[str, Meta(max_length=256)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
PositiveInt = Annotated[int, Meta(ge=1, le=_INT32_MAX)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=_INT32_MAX)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=2)]


# ---- requests ----


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    text: str


class ImageURL(PictureSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(min_length=1)]


class ImagePart(msgspec.Struct, tag="image_url", tag_field="type", forbid_unknown_fields=True):
    image_url: ImageURL


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields after `tool_call_id` come back with an assistant's message of OpenAI's; they must ask for nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1, max_length=256)] | None = None
    name: ShortString | None = None  # without effect: the chat templates served here do not show it
    tool_calls: Annotated[list[PastToolCall], Meta(max_length=128)] | None = None  # the assistant's
    tool_call_id: ShortString | None = None  # of the call that a tool's message answers
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # without effect: chunks are never padded


class GenerationFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a request may say of its answers, chat or not. None is the same as leaving it out."""

    max_tokens: PositiveInt | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, le=_INT32_MAX)]], Meta(max_length=128)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-_INT32_MAX, le=_INT32_MAX)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_INT32_MAX)] | None = None
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    guided_json: Schema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None

    # Accepted without effect: they change no answer.
    user: ShortString | None = None
    safety_identifier: ShortString | None = None
    prompt_cache_key: ShortString | None = None
    prompt_cache_retention: ShortString | None = None
    service_tier: ShortString | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def answer_limit(self) -> int | None:
        """Tokens of an answer, at most."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams.logprobs."""
        return None


class ChatCompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    """None, in every optional field, is the same as leaving it out."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)]

    max_completion_tokens: PositiveInt | None = None  # the newer name of max_tokens; goes first if both are given
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None  # "auto" with tools
    parallel_tool_calls: bool | None = None  # false: no call after the first
    chat_template_kwargs: dict[str, Any] | None = None  # values of the model's chat template's own variables

    # Accepted without effect: no template served here knows grades of effort, and nothing is predicted.
    reasoning_effort: ShortString | None = None
    verbosity: ShortString | None = None
    prediction: Any = None

    # Refused, unless the value asks for what happens anyway (_NO_EFFECT).
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    best_of: Any = None
    echo: Any = None
    prompt_logprobs: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None
    chat_template: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_NOT_BUILT = ChatCompletionRequest.__struct_fields__[ChatCompletionRequest.__struct_fields__.index("functions") :]
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_MESSAGE_NOT_BUILT = ("audio", "function_call")

T = TypeVar("T")
_decoder = msgspec.json.Decoder(ChatCompletionRequest)
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>.*)`$")
_PART_TYPE = re.compile(r"^Invalid value '(?P<type>[\w-]{1,64})'$")
_FIELD = re.compile(r"^Object (?P<fault>missing required|contains unknown) field `(?P<name>.*)`$", re.DOTALL)


def check_body_size(num_bytes: int, max_bytes: int = MAX_BODY_BYTES) -> None:
    """Raises RequestError (413)."""
    if num_bytes > max_bytes:
        allowed = f"{max_bytes >> 20} MiB" if max_bytes % (1 << 20) == 0 else f"{max_bytes} bytes"
        raise RequestError(f"The body has more than {allowed}", code="request_too_large", status=413)


def check_model(name: str, served_model_name: str) -> None:
    """Raises RequestError (404)."""
    if name != served_model_name:
        raise model_not_found(name)


def model_not_found(name: str) -> RequestError:
    return RequestError(f"The model `{name[:200]}` does not exist", code="model_not_found", param="model", status=404)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """`body` in the decoder's form. Raises RequestError (400) for the first fault, naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        _raise_invalid(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, msgspec.DecodeError) else "it is not UTF-8"
        raise RequestError(f"The body is not valid JSON: {reason}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply", code="invalid_json") from None


def decode_chat_request(body: bytes) -> ChatCompletionRequest:
    """The request in `body`, wholly checked. Raises RequestError (400) for the first fault, naming the field."""
    request = decode(_decoder, body)
    check_built(request, _NOT_BUILT)
    check_messages(request.messages)
    check_tool_choice(request.tools or (), request.tool_choice)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    check_stream_options(request)
    return request


def check_stream_options(request: GenerationFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def _raise_invalid(message: str) -> NoReturn:
    """Words of msgspec, "Expected `int` <= 16 - at `$.n`", as OpenAI's error: message, code, param."""
    path = ""
    if place := _PLACE.search(message):
        path, message = place["path"], message[: place.start()]
    code = "invalid_type" if ", got `" in message else "invalid_value"
    if field := _FIELD.match(message):
        path = f"{path}.{field['name']}" if path else field["name"]
        missing = field["fault"] == "missing required"
        code = "missing_required_parameter" if missing else "unknown_parameter"
        message = "is required" if missing else "is not a known parameter"
    elif (part := _PART_TYPE.match(message)) and (".content[" in path or path.startswith("input[")):
        message = f"{part['type']} parts are not supported by this server: it takes text and image_url"
    path, message = path[:200], message[:200]
    raise RequestError(f"{path}: {message}" if path else message, code=code, param=path or None)


def _is_harmless(name: str, value: Any) -> bool:
    return any(type(value) is type(harmless) and value == harmless for harmless in _NO_EFFECT.get(name, ()))


def check_built(request: msgspec.Struct, names: Iterable[str]) -> None:
    """Raises RequestError when a field of `names`, which are not built, asks for something."""
    for name in names:
        value = getattr(request, name)
        if value is not None and not _is_harmless(name, value):
            raise RequestError(f"{name} is not supported", code="unsupported_parameter", param=name)


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """What types do not say of a conversation. Raises RequestError."""
    for i, message in enumerate(messages):
        for name in _MESSAGE_NOT_BUILT:
            if getattr(message, name):
                param = f"messages[{i}].{name}"
                raise RequestError(f"{param} is not supported", code="unsupported_parameter", param=param)
        if message.tool_calls and message.role != "assistant":
            param = f"messages[{i}].tool_calls"
            raise RequestError(f"{param}: only the assistant calls tools", param=param)
        if message.content is None and not message.tool_calls:
            param = f"messages[{i}].content"
            raise RequestError(f"{param}: is required", code="missing_required_parameter", param=param)


# ---- answers ----


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int
    image_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET  # then `content` is None if there is no text


class Choice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET  # said with the finish_reason


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """`usage`: absent, null in every chunk but the last when include_usage asked for it, or filled in."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "mmv1"
    root: str  # where the model is, as vLLM says it
    max_model_len: int


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


class ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorObject


def error_of(error: BaseException) -> tuple[int, ErrorBody]:
    """HTTP status and body for anything that went wrong. Only our own RequestErrors speak to the client in their own words."""
    if isinstance(error, RequestError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        kind = "rate_limit_error" if error.status == 429 else kind
        return error.status, ErrorBody(ErrorObject(error.message, kind, error.param, error.code))
    if isinstance(error, ShuttingDownError):
        return 503, ErrorBody(ErrorObject("The server is shutting down", "server_error", None, "shutting_down"))
    if isinstance(error, EmbedderDeadError):
        return 503, ErrorBody(ErrorObject("The embedding model is not available", "server_error", None, "embedder_unavailable"))
    if isinstance(error, EngineDeadError):
        return 503, ErrorBody(ErrorObject("The engine is not available", "server_error", None, "engine_unavailable"))
    return 500, ErrorBody(ErrorObject("The server failed to answer this request", "server_error", None, "internal_error"))


_encoder = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def encode_text(text: str) -> bytes:
    """A JSON string."""
    return _encoder.encode(text)


def encode_event(message: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(message) + b"\n\n"
