"""The chat API's JSON, both ways, as msgspec structs: what a request may say, and the shapes of answers, chunks and errors.

Every field is checked for type and range while it is decoded, and the first fault becomes a RequestError whose `param` names
the field. Fields known to clients fall in three groups: built, accepted without effect (they change no answer), and refused
(they would change the answer and are not built). Any other name is refused too: a misspelt option is never ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mmv1.errors import EngineDeadError, RequestError
from mmv1.preprocess.image_settings import PictureSettings, ProcessorKwargs

MAX_BODY_BYTES = 32 << 20
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
    """The fields after `content` come back with an assistant's message of OpenAI's; they must ask for nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1, max_length=256)]
    name: ShortString | None = None  # without effect: the chat templates served here do not show it
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: Any = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # without effect: chunks are never padded


class ChatCompletionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """None, in every optional field, is the same as leaving it out."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)]

    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None  # the newer name of max_tokens; goes first if both are given
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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-_INT32_MAX, le=_INT32_MAX)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None

    # Accepted without effect: they change no answer.
    user: ShortString | None = None
    safety_identifier: ShortString | None = None
    prompt_cache_key: ShortString | None = None
    prompt_cache_retention: ShortString | None = None
    service_tier: ShortString | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None  # there are no tools to call

    # Refused, unless the value asks for what happens anyway (_NO_EFFECT).
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    logit_bias: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None
    best_of: Any = None
    min_tokens: Any = None
    echo: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    prompt_logprobs: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None


_NOT_BUILT = ChatCompletionRequest.__struct_fields__[ChatCompletionRequest.__struct_fields__.index("tools") :]
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "best_of": (1,),
    "min_tokens": (0,),
    "echo": (False,),
    "bad_words": ([],),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_MESSAGE_NOT_BUILT = ("audio", "function_call", "tool_calls")

_decoder = msgspec.json.Decoder(ChatCompletionRequest)
_PLACE = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_FIELD = re.compile(r"^Object (?P<fault>missing required|contains unknown) field `(?P<name>.*)`$", re.DOTALL)


def check_body_size(num_bytes: int) -> None:
    """Raises RequestError (413)."""
    if num_bytes > MAX_BODY_BYTES:
        raise RequestError(f"The body has more than {MAX_BODY_BYTES >> 20} MiB", code="request_too_large", status=413)


def check_model(name: str, served_model_name: str) -> None:
    """Raises RequestError (404)."""
    if name != served_model_name:
        raise RequestError(f"The model `{name[:200]}` does not exist", code="model_not_found", param="model", status=404)


def decode_chat_request(body: bytes) -> ChatCompletionRequest:
    """The request in `body`, wholly checked. Raises RequestError (400) for the first fault, naming the field."""
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        _raise_invalid(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, msgspec.DecodeError) else "it is not UTF-8"
        raise RequestError(f"The body is not valid JSON: {reason}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply", code="invalid_json") from None
    _check_built(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    return request


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
    path, message = path[:200], message[:200]
    raise RequestError(f"{path}: {message}" if path else message, code=code, param=path or None)


def _is_harmless(name: str, value: Any) -> bool:
    return any(type(value) is type(harmless) and value == harmless for harmless in _NO_EFFECT.get(name, ()))


def _check_built(request: ChatCompletionRequest) -> None:
    for name in _NOT_BUILT:
        value = getattr(request, name)
        if value is not None and not _is_harmless(name, value):
            raise RequestError(f"{name} is not supported", code="unsupported_parameter", param=name)
    for i, message in enumerate(request.messages):
        for name in _MESSAGE_NOT_BUILT:
            if getattr(message, name):
                param = f"messages[{i}].{name}"
                raise RequestError(f"{param} is not supported", code="unsupported_parameter", param=param)


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
    content: str
    role: str = "assistant"
    refusal: None = None


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
        return error.status, ErrorBody(ErrorObject(error.message, kind, error.param, error.code))
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
