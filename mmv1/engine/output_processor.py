"""Turns the core's tokens into what a client reads: text, stop strings, log-probabilities with token text. Torch-free.

One record per core request. Everything given out is a difference; the consumer accumulates. It knows nothing of HTTP, nor of
how the n answers of one prompt are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mmv1.errors import ContextLengthError, EngineError, ImageError, MMV1Error, RequestError
from mmv1.types import EngineCoreOutput, EngineCoreRequest, FinishReason, TokenLogprobs

_MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
_MAX_PENDING = 64  # tokens without text before the decode stream is restarted: its cost grows with what it holds
_UTF8_TAIL = 3  # tokens kept over such a restart: an unfinished UTF-8 character has at most three bytes
_FETCH_CODES = ("image_url_forbidden", "image_fetch_failed", "image_fetch_timeout")
_IMAGE_CODES = frozenset(("invalid_image", "image_too_large", "unsupported_image_format", "too_many_images", *_FETCH_CODES))
_SERVER_CODES = frozenset((None, "internal_error", "preprocess_crashed", "engine_unavailable"))


class TokenLogprob(msgspec.Struct):
    """One token and how likely it was. `utf8` are the token's own bytes; `token` has U+FFFD where they are no whole character."""

    token_id: int
    token: str
    utf8: bytes
    logprob: float


class PositionLogprobs(msgspec.Struct):
    """One position: the sampled token, its rank (1: the most likely), and the k most likely ones."""

    sampled: TokenLogprob
    rank: int
    top: list[TokenLogprob]


class CompletionOutput(msgspec.Struct):
    """What is new in one of the n answers. `finish_reason` is set once, with the last of them."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it; None for end-of-sequence


class CompletionDelta(msgspec.Struct):
    """What `emit` is called with: news of one core request. `error` set: it failed, and this is the last of it."""

    parent_id: str
    output: CompletionOutput
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    error: MMV1Error | None = None


Emit = Callable[[CompletionDelta], None]


class RequestOutput(msgspec.Struct):
    """News of a client's request: the deltas of its n answers, merged. `finished`: every answer is complete."""

    request_id: str
    outputs: list[CompletionOutput]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    finished: bool = False
    prompt_token_ids: list[int] | None = None
    num_image_tokens: int = 0  # of the prompt's tokens, those that stand for its pictures


def error_from_core(message: str, code: str | None) -> MMV1Error:
    """The exception for an error the core reports by code: whose fault it is decides the class."""
    if code in _SERVER_CODES:
        return EngineError(message)
    if code in _IMAGE_CODES:
        return ImageError(message, code=str(code))
    if code == "context_length_exceeded":
        return ContextLengthError(message)
    return RequestError(message, code=str(code))


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2's): printable bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class _TokenTable:
    """Text and bytes of single tokens, looked up once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_of_character()
        self._known: dict[int, tuple[str, bytes]] = {}

    def lookup(self, token_id: int) -> tuple[str, bytes]:
        entry = self._known.get(token_id)
        if entry is None:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            entry = self._known[token_id] = (text, self._utf8(token_id, text))
        return entry

    def _utf8(self, token_id: int, text: str) -> bytes:
        """A token that is part of a character decodes to U+FFFD: its bytes are then read from its name in the vocabulary."""
        name = self._tokenizer.id_to_token(token_id) or ""
        if "\ufffd" in text and name:
            if name.startswith("<0x") and len(name) == 6:
                return bytes.fromhex(name[3:5])
            if all(character in self._bytes for character in name):
                return bytes(self._bytes[character] for character in name)
        return text.encode()

    def logprobs(self, position: TokenLogprobs) -> PositionLogprobs:
        entries = [
            TokenLogprob(token_id, *self.lookup(token_id), max(_MIN_LOGPROB, logprob))
            for token_id, logprob in zip(position.token_ids, position.logprobs, strict=True)
        ]
        return PositionLogprobs(entries[0], position.sampled_rank, entries[1:])


class _Detokenizer:
    """Tokens to text, one by one: a character appears when its last byte has come. The text given out is, put together,
    that of decoding all tokens at once."""

    __slots__ = ("_pending", "_skip_special_tokens", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []  # tokens whose text has not been given out

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # tokenizers has no class for "Invalid prefix encountered": this text depends on its neighbours
            return self._restart(keep=0)
        if text is not None:
            self._pending.clear()
            return text
        return "" if len(self._pending) < _MAX_PENDING else self._restart(keep=_UTF8_TAIL)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that became no character."""
        return self._restart(keep=0) if self._pending else ""

    def _restart(self, keep: int) -> str:
        cut = len(self._pending) - keep
        text = self._tokenizer.decode(self._pending[:cut], skip_special_tokens=self._skip_special_tokens)
        self._pending = self._pending[cut:]
        self._stream = DecodeStream(ids=self._pending, skip_special_tokens=self._skip_special_tokens)
        return text


class _StopStrings:
    """Finds the stop string that is complete first, however the text is cut into pieces; of two that end together, the longer.
    Text that may be the beginning of one is held back."""

    __slots__ = ("_held", "_include", "_prefixes", "_stops")

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = stops
        self._include = include
        prefixes = {stop[:length] for stop in stops for length in range(1, len(stop))}
        self._prefixes = tuple(sorted(prefixes, key=len, reverse=True))
        self._held = ""

    def push(self, piece: str, last: bool = False) -> tuple[str, str | None]:
        """The text that may be given out now, and the stop string found, if any (then nothing follows)."""
        text = self._held + piece
        found = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, minus_length, stop = min(found)
            return text[: end if self._include else end + minus_length], stop
        keep = 0
        if not last and text.endswith(self._prefixes):
            keep = next(len(prefix) for prefix in self._prefixes if text.endswith(prefix))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


class _RequestState:
    __slots__ = ("detokenizer", "emit", "include_stop", "index", "num_early", "num_prompt_tokens", "parent_id", "stop_strings")

    def __init__(self, request: EngineCoreRequest, tokenizer: Tokenizer, parent_id: str, index: int, emit: Emit) -> None:
        params = request.sampling_params
        self.parent_id = parent_id
        self.index = index
        self.emit = emit
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.include_stop = params.include_stop_str_in_output
        self.detokenizer = _Detokenizer(tokenizer, params.skip_special_tokens)
        self.stop_strings = _StopStrings(params.stop, self.include_stop) if params.stop else None
        self.num_early = params.min_tokens  # tokens whose text no stop string is looked for in

    def read(self, token_ids: list[int], last: bool) -> tuple[str, int, str | None]:
        """The text of `token_ids` that may be given out, how many of them were used, and the stop string found, if any."""
        detokenizer, stop_strings = self.detokenizer, self.stop_strings
        if stop_strings is None:
            text = "".join([detokenizer.push(token_id) for token_id in token_ids])
            return (text + detokenizer.flush() if last else text), len(token_ids), None
        text = ""
        for used, token_id in enumerate(token_ids, 1):
            if self.num_early > 0:
                self.num_early -= 1
                text += detokenizer.push(token_id)
                continue
            piece, stop = stop_strings.push(detokenizer.push(token_id))
            text += piece
            if stop is not None:
                return text, used, stop
        if last:
            piece, stop = stop_strings.push(detokenizer.flush(), last=True)
            text += piece
            return text, len(token_ids), stop
        return text, len(token_ids), None


class OutputProcessor:
    """The records of the requests the core is working on. Used from one thread (the event loop's)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = _TokenTable(tokenizer)
        self._requests: dict[str, _RequestState] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add_request(self, request: EngineCoreRequest, *, parent_id: str, index: int, emit: Emit) -> None:
        """From now on `emit` is called, inside `process`, with everything new in answer `index` of the client's request."""
        self._requests[request.request_id] = _RequestState(request, self._tokenizer, parent_id, index, emit)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests; nothing more is emitted for them. Unknown ids are ignored."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def process(self, outputs: list[EngineCoreOutput]) -> list[str]:
        """Emit what is new. Returns the ids the core must abort, since a stop string ended them here."""
        stopped_here: list[str] = []
        for output in outputs:
            state = self._requests.get(output.request_id)
            if state is None:  # late news of an aborted request
                continue
            delta = self._read(state, output)
            if delta.error is not None or delta.output.finish_reason is not None:
                del self._requests[output.request_id]
                if output.finish_reason is None:
                    stopped_here.append(output.request_id)
            state.emit(delta)
        return stopped_here

    def _read(self, state: _RequestState, news: EngineCoreOutput) -> CompletionDelta:
        reason = news.finish_reason
        delta = CompletionDelta(
            state.parent_id, CompletionOutput(state.index, "", []), state.num_prompt_tokens, news.num_cached_tokens
        )
        if reason is FinishReason.ERROR or reason is FinishReason.ABORT:
            delta.error = error_from_core(news.error or "the engine gave up this request", news.error_code)
            return delta
        token_ids = news.new_token_ids
        # The token that ended the answer (end-of-sequence or a stop token id) is counted, but is no part of its text.
        hidden = reason is FinishReason.STOP and not state.include_stop
        text, used, stop = state.read(token_ids[:-1] if hidden else token_ids, last=reason is not None)
        output = delta.output
        output.text = text
        output.token_ids = token_ids if stop is None else token_ids[:used]
        if news.new_logprobs is not None:
            output.logprobs = [self._tokens.logprobs(position) for position in news.new_logprobs[: len(output.token_ids)]]
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop
        elif reason is not None:
            output.finish_reason, output.stop_reason = reason.name.lower(), news.stop_reason
        return delta
