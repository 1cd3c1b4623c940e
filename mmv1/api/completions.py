"""/v1/completions: raw prompts, as text in which special tokens mean themselves or as token ids, and what the model writes after
them. Several prompts are computed at once; answer j of prompt i is choice i * n + j.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mmv1.api.chat import SamplingDefaults, to_sampling_params
from mmv1.api.metrics import Metrics
from mmv1.api.protocol import (
    GenerationFields,
    Usage,
    check_built,
    check_stream_options,
    decode,
    encode,
    encode_event,
    error_of,
)
from mmv1.api.tally import Tally, usage_of
from mmv1.engine.async_llm import RawPrompt
from mmv1.engine.output_processor import CompletionOutput, PositionLogprobs, RequestOutput
from mmv1.errors import MMV1Error, RequestError
from mmv1.log import logger

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM

_MAX_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(min_length=1)]
    prompt: str | list[str | int | list[int]]  # a text, token ids, or several of one kind
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None  # those that the tokenizer puts before every text; None: yes

    # Refused, unless the value asks for what happens anyway.
    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    prompt_logprobs: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens or _DEFAULT_MAX_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


_NOT_BUILT = CompletionRequest.__struct_fields__[CompletionRequest.__struct_fields__.index("best_of") :]
_decoder = msgspec.json.Decoder(CompletionRequest)


class CompletionLogprobs(msgspec.Struct):
    """`text_offset`: where each token's text begins in the answer, in characters."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct, kw_only=True):
    """Whole, or one event of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


def decode_completion_request(body: bytes) -> CompletionRequest:
    """The request in `body`, wholly checked. Raises RequestError (400) for the first fault, naming the field."""
    request = decode(_decoder, body)
    check_built(request, _NOT_BUILT)
    check_stream_options(request)
    return request


def to_prompts(prompt: str | list[str | int | list[int]], *, add_special_tokens: bool = True) -> list[RawPrompt]:
    """Raises RequestError for a list that is neither token ids nor several prompts of one kind."""
    if isinstance(prompt, str):
        return [RawPrompt(prompt, add_special_tokens=add_special_tokens)]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        fault = "is empty" if not kinds else "mixes texts and token ids"
        raise RequestError(f"prompt: the list {fault}", param="prompt")
    if kinds == {int}:
        return [RawPrompt(prompt)]  # type: ignore[arg-type]
    if len(prompt) > _MAX_PROMPTS:
        raise RequestError(f"prompt: at most {_MAX_PROMPTS} in one request", param="prompt")
    return [RawPrompt(item, add_special_tokens=add_special_tokens) for item in prompt]  # type: ignore[arg-type]


class _LogprobsWriter:
    """One answer's log-probabilities in this endpoint's form, piece by piece."""

    def __init__(self) -> None:
        self._offset = 0

    def write(self, positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        written = CompletionLogprobs([], [], [], [])
        for position in positions:
            sampled = position.sampled
            written.text_offset.append(self._offset)
            written.token_logprobs.append(sampled.logprob)
            written.tokens.append(sampled.token)
            written.top_logprobs.append({sampled.token: sampled.logprob} | {top.token: top.logprob for top in position.top})
            self._offset += len(sampled.token)
        return written


class CompletionAnswer:
    """The answer to one request. Use `full` or `events`, once. Both are as chat's (`ChatAnswer`)."""

    def __init__(self, llm: AsyncLLM, request: CompletionRequest, defaults: SamplingDefaults, metrics: Metrics) -> None:
        self._llm = llm
        self._request = request
        self._prompts = to_prompts(request.prompt, add_special_tokens=request.add_special_tokens is not False)
        self._params = to_sampling_params(request, defaults, llm.config.model.vocab_size)
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._tallies = [Tally(metrics) for _ in self._prompts]
        self._logprobs = [_LogprobsWriter() for _ in range(len(self._prompts) * self._params.n)]

    async def full(self) -> AsyncGenerator[bytes, None]:
        choices = [CompletionChoice(index=index, text="") for index in range(len(self._logprobs))]
        texts: list[list[str]] = [[] for _ in choices]
        async with aclosing(self._news()) as all_news:
            async for news in all_news:
                for piece in news:
                    texts[piece.index].append(piece.text)
                    _extend(choices[piece.index], piece)
        for choice, text in zip(choices, texts, strict=True):
            choice.text = "".join(text)
        yield encode(self._completion(choices, usage_of(self._tallies)))

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._request.stream_options
        include_usage = options is not None and bool(options.include_usage)
        usage: Usage | UnsetType | None = None if include_usage else UNSET
        started = False
        try:
            async with aclosing(self._news()) as all_news:
                async for news in all_news:
                    if include_usage and options is not None and options.continuous_usage_stats:
                        usage = usage_of(self._tallies)
                    for piece in news:
                        if piece.text or piece.logprobs is not None or piece.finish_reason is not None:
                            started = True
                            yield encode_event(self._completion([piece], usage))
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, MMV1Error):
                logger.exception("A stream failed")
            yield encode_event(error_of(error)[1])
            return
        if include_usage:
            yield encode_event(self._completion([], usage_of(self._tallies)))
        yield b"data: [DONE]\n\n"

    async def _news(self) -> AsyncGenerator[list[CompletionChoice], None]:
        """What is new in the choices, as it comes from all prompts. Raises what ends the first of them, and ends the others."""
        queue: asyncio.Queue[list[CompletionChoice] | Exception | None] = asyncio.Queue(maxsize=len(self._prompts))
        tasks = [asyncio.ensure_future(self._follow(number, queue)) for number in range(len(self._prompts))]
        try:
            num_open = len(tasks)
            while num_open:
                news = await queue.get()
                if isinstance(news, RequestError) and news.param == "messages":
                    news.param = "prompt"  # where this endpoint's prompts are
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    num_open -= 1
                else:
                    yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, number: int, queue: asyncio.Queue[list[CompletionChoice] | Exception | None]) -> None:
        """One prompt's news into the queue, and how it ended: None, or the exception."""
        try:
            with self._tallies[number].timed():
                async with aclosing(self._generate(number)) as outputs:
                    async for output in outputs:
                        self._tallies[number].count(output)
                        await queue.put([self._choice(number, news) for news in output.outputs])
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    def _generate(self, number: int) -> AsyncGenerator[RequestOutput, None]:
        request = self._request
        return self._llm.generate(
            self._prompts[number],
            self._params,
            request_id=f"{self._id}-{number}",
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )

    def _choice(self, number: int, news: CompletionOutput) -> CompletionChoice:
        index = number * self._params.n + news.index
        logprobs = None if news.logprobs is None else self._logprobs[index].write(news.logprobs)
        return CompletionChoice(
            index=index,
            text=news.text,
            logprobs=logprobs,
            finish_reason=news.finish_reason,
            stop_reason=news.stop_reason,
        )

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._request.model, choices=choices, usage=usage)


def _extend(choice: CompletionChoice, news: CompletionChoice) -> None:
    if choice.logprobs is None:
        choice.logprobs = news.logprobs
    elif news.logprobs is not None:
        for name in CompletionLogprobs.__struct_fields__:
            getattr(choice.logprobs, name).extend(getattr(news.logprobs, name))
    if news.finish_reason is not None:
        choice.finish_reason, choice.stop_reason = news.finish_reason, news.stop_reason
