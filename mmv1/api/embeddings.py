"""/v1/embeddings, in OpenAI's form: texts, pictures, or a list that mixes them; and a chat-like message, as vLLM takes it.

Each input has one embedding. CLIP reads a picture or a text, never both as one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

import msgspec
import pybase64
from msgspec import Meta

from mmv1.api.protocol import ChatMessage, ImagePart, ImageURL, ShortString, TextPart, check_messages, decode, encode
from mmv1.embedding.embedder import Embedder, Embedding, PictureInput, TextInput
from mmv1.errors import RequestError
from mmv1.preprocess.image_loader import off_loop

Input = str | int | list[int] | TextPart | ImagePart


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either `input` or `messages`. None, in every optional field, is the same as leaving it out."""

    model: Annotated[str, Meta(min_length=1)]
    input: str | Annotated[list[Input], Meta(min_length=1, max_length=2048)] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=-1)] | None = None  # vLLM's; -1: as many as the model reads
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None  # refused, unless they are those that there are
    user: ShortString | None = None  # without effect


class EmbeddingObject(msgspec.Struct, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    """Tokens of texts, those that begin and end them included; a picture has none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


_decoder = msgspec.json.Decoder(EmbeddingRequest)


def decode_embedding_request(body: bytes) -> EmbeddingRequest:
    """Raises RequestError (400) for the first fault, naming the field."""
    request = decode(_decoder, body)
    if (request.input is None) == (request.messages is None):
        raise RequestError("give either input or messages", param="input")
    check_messages(request.messages or ())
    return request


async def embeddings(embedder: Embedder, request: EmbeddingRequest, cache_salt: str) -> AsyncGenerator[bytes, None]:
    """The answer, as one piece. Raises RequestError, EmbedderDeadError, ShuttingDownError."""
    assert embedder.ready is not None
    if request.dimensions not in (None, embedder.ready.dimensions):
        message = f"dimensions: embeddings of {embedder.name} have {embedder.ready.dimensions} numbers, and cannot be shortened"
        raise RequestError(message, code="unsupported_parameter", param="dimensions")
    inputs = _of_messages(request.messages) if request.messages is not None else _of_input(request.input or "")
    truncate = request.truncate_prompt_tokens is not None
    found = await embedder.embed(inputs, truncate=truncate, tenant_scope=cache_salt.encode())
    size = sum(len(each.values) for each in found)
    yield await off_loop(64 * size, _encoded, embedder.name, found, request.encoding_format == "base64")


def _encoded(model: str, found: Sequence[Embedding], as_base64: bool) -> bytes:
    data = []
    for index, each in enumerate(found):
        numbers: Any = memoryview(each.values).cast("f")
        embedding = pybase64.b64encode(each.values).decode() if as_base64 else numbers.tolist()
        data.append(EmbeddingObject(index=index, embedding=embedding))
    num_tokens = sum(each.num_tokens for each in found)
    return encode(EmbeddingResponse(data=data, model=model, usage=EmbeddingUsage(num_tokens, num_tokens)))


def _of_input(given: str | Sequence[Input]) -> list[TextInput | PictureInput]:
    """Raises RequestError for token ids."""
    if isinstance(given, str):
        return [_of_part(given, "input")]
    return [_of_part(one, f"input[{i}]") for i, one in enumerate(given)]


def _of_messages(messages: Sequence[ChatMessage]) -> list[TextInput | PictureInput]:
    """Of a conversation that is one picture or one text. Raises RequestError for any other."""
    parts: list[tuple[Any, str]] = []
    for i, message in enumerate(messages):
        content = message.content or ""
        if isinstance(content, str):
            parts.append((content, f"messages[{i}].content"))
        else:
            parts += [(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]
    if len(parts) != 1:
        raise RequestError("messages must hold one picture or one text: send several as input", param="messages")
    return [_of_part(*parts[0])]


def _of_part(one: Input, place: str) -> TextInput | PictureInput:
    if isinstance(one, ImagePart):
        _check_size_is_not_said(one.image_url, f"{place}.image_url")
        return PictureInput(one.image_url.url, place)
    if isinstance(one, TextPart):
        return TextInput(one.text, place)
    if isinstance(one, str):
        return TextInput(one, place)
    # They are mostly of another tokenizer: clients that count tokens first send those of OpenAI's models.
    raise RequestError("token ids are not supported, for they mean something else to each model: send texts", param="input")


def _check_size_is_not_said(picture: ImageURL, place: str) -> None:
    for name in ("min_pixels", "max_pixels"):
        if getattr(picture, name) is not None:
            message = f"{place}.{name} is not supported: the embedding model reads pictures of one size"
            raise RequestError(message, code="unsupported_parameter", param=f"{place}.{name}")
