"""/tokenize and /detokenize, with vLLM's fields: what a prompt or a conversation comes to in tokens, its pictures included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from mmv1.api.chat import to_conversation
from mmv1.api.protocol import ChatMessage, check_built, check_messages, decode
from mmv1.api.tools import Tool, as_template_tools
from mmv1.engine.async_llm import ChatPrompt, RawPrompt
from mmv1.errors import RequestError
from mmv1.preprocess.image_settings import NOTHING_SAID, ProcessorKwargs

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM

TokenIds = Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=1 << 20)]


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either `prompt`, in which special tokens mean themselves, or `messages`."""

    model: Annotated[str, Meta(min_length=1)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None  # of a prompt: those that the tokenizer puts before every text; None: yes
    chat_template_kwargs: dict[str, Any] | None = None

    # Refused, unless the value asks for what happens anyway.
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None


class TokenizeResponse(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(min_length=1)] | None = None
    tokens: TokenIds


class DetokenizeResponse(msgspec.Struct):
    prompt: str


_NOT_BUILT = TokenizeRequest.__struct_fields__[TokenizeRequest.__struct_fields__.index("add_generation_prompt") :]
_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


def decode_tokenize_request(body: bytes) -> TokenizeRequest:
    """Raises RequestError (400) for the first fault, naming the field."""
    request = decode(_tokenize_decoder, body)
    check_built(request, _NOT_BUILT)
    check_messages(request.messages or ())
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    for name in ("tools", "chat_template_kwargs"):
        if getattr(request, name) and request.messages is None:
            raise RequestError(f"{name} need messages", param=name)
    return request


def decode_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Raises RequestError (400) for the first fault, naming the field."""
    return decode(_detokenize_decoder, body)


async def tokenize(llm: AsyncLLM, request: TokenizeRequest, cache_salt: str) -> TokenizeResponse:
    """The ids that an answer would be computed from: each picture is fetched, and its placeholder repeated as often as it has
    tokens. Raises RequestError as a request for an answer would, but not for the context's length."""
    prompt: ChatPrompt | RawPrompt
    if request.messages is not None:
        conversation, tools = to_conversation(request.messages), as_template_tools(request.tools or ())
        prompt = ChatPrompt(conversation, tools, request.chat_template_kwargs or {})
    else:
        prompt = RawPrompt(request.prompt or "", add_special_tokens=request.add_special_tokens is not False)
    kwargs = request.mm_processor_kwargs
    settings = NOTHING_SAID if kwargs is None else kwargs.settings()
    token_ids = await llm.tokenize(prompt, cache_salt=cache_salt, image_settings=settings)
    names = None
    if request.return_token_strs:
        names = [llm.tokenizer.id_to_token(token_id) for token_id in token_ids]
    return TokenizeResponse(len(token_ids), llm.max_model_len, token_ids, names)


def detokenize(llm: AsyncLLM, request: DetokenizeRequest) -> DetokenizeResponse:
    """The text of `tokens`, special ones included. Raises RequestError for one outside the vocabulary."""
    vocab_size = llm.config.model.vocab_size
    if any(token_id >= vocab_size for token_id in request.tokens):
        raise RequestError(f"tokens: the vocabulary has {vocab_size} tokens", param="tokens")
    return DetokenizeResponse(llm.tokenizer.decode(request.tokens, skip_special_tokens=False))
