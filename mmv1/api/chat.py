"""One chat request, from the decoded JSON to the bytes of its answer: conversation, sampling parameters, full answer or events.

Both forms are async generators of bytes: a full answer yields once, a stream once per output. An error before the first yield
is raised, so that it can still become an HTTP status; later the stream ends with an error event and no `[DONE]`. Closing the
generator aborts the request in the engine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from mmv1.api.metrics import Metrics
from mmv1.api.protocol import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatMessage,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    GenerationFields,
    MinP,
    RepetitionPenalty,
    Temperature,
    TextPart,
    TokenLogprob,
    TopK,
    TopLogprob,
    TopP,
    Usage,
    encode,
    encode_event,
    encode_text,
    error_of,
)
from mmv1.api.structured import to_structured_outputs
from mmv1.api.tally import Tally, usage_of
from mmv1.api.tools import (
    NamedToolChoice,
    ToolCallDelta,
    ToolCallParser,
    as_template_call,
    as_template_tools,
    forced_call_schema,
    join_calls,
)
from mmv1.config import read_json
from mmv1.engine.async_llm import ChatPrompt
from mmv1.engine.output_processor import CompletionOutput, PositionLogprobs, RequestOutput
from mmv1.errors import ConfigError, MMV1Error, RequestError
from mmv1.log import logger
from mmv1.preprocess import prompt
from mmv1.preprocess.image_settings import NOTHING_SAID
from mmv1.types import SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a request does not say: the model directory's generation_config.json decides, then OpenAI's defaults."""

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0

    @classmethod
    def of_model(cls, model_dir: str) -> SamplingDefaults:
        """Raises ConfigError when the file's values are no sampling parameters."""
        given = read_json(Path(model_dir) / "generation_config.json")
        known = {name: given[name] for name in cls.__struct_fields__ if given.get(name) is not None}
        try:
            return msgspec.convert(known, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"generation_config.json in the model directory cannot be used: {error}") from error


def to_conversation(
    messages: Sequence[ChatMessage], pictures: Mapping[str, bytes] = MappingProxyType({})
) -> list[prompt.Message]:
    """The messages for the chat template. A picture stays the URL it came as, unless `pictures` has an encoded file for that;
    OpenAI's developer role is the system's."""
    conversation = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        content: str | list[prompt.TextPart | prompt.ImagePart]
        if message.content is None or isinstance(message.content, str):
            content = message.content or ""
        else:
            content = [
                prompt.TextPart(part.text)
                if isinstance(part, TextPart)
                else prompt.ImagePart(
                    pictures.get(part.image_url.url, part.image_url.url),
                    part.image_url.settings(f"messages[{i}].content[{j}].image_url"),
                )
                for j, part in enumerate(message.content)
            ]
        calls = tuple(
            as_template_call(call, f"messages[{i}].tool_calls[{j}]") for j, call in enumerate(message.tool_calls or ())
        )
        conversation.append(prompt.Message(role, content, calls, message.tool_call_id))
    return conversation


def to_sampling_params(request: GenerationFields, defaults: SamplingDefaults, vocab_size: int) -> SamplingParams:
    """Raises RequestError for a stop token id outside the vocabulary."""
    stop_token_ids = tuple(request.stop_token_ids or ())
    if any(token_id >= vocab_size for token_id in stop_token_ids):
        raise RequestError(f"stop_token_ids: the vocabulary has {vocab_size} tokens", param="stop_token_ids")
    chosen = {
        name: getattr(defaults, name) if getattr(request, name) is None else getattr(request, name)
        for name in SamplingDefaults.__struct_fields__
    }
    return SamplingParams(
        **chosen,
        n=request.n or 1,
        seed=request.seed,
        max_tokens=request.answer_limit,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logprobs=request.num_logprobs,
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
        logit_bias=request.logit_bias or {},
        bad_words=tuple(request.bad_words or ()),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        structured_outputs=to_structured_outputs(request),
    )


def to_logprobs(positions: list[PositionLogprobs] | None) -> ChoiceLogprobs | None:
    if positions is None:
        return None
    return ChoiceLogprobs(
        [
            TokenLogprob(
                position.sampled.token,
                position.sampled.logprob,
                list(position.sampled.utf8),
                [TopLogprob(top.token, top.logprob, list(top.utf8)) for top in position.top],
            )
            for position in positions
        ]
    )


def _tool_parsers(request: ChatCompletionRequest, num_answers: int) -> list[ToolCallParser]:
    """One for each answer, or none where no call is looked for."""
    if not request.tools or request.tool_choice == "none":
        return []
    is_forced = request.tool_choice not in (None, "auto")
    max_calls = 1 if request.parallel_tool_calls is False else None
    return [ToolCallParser(inside=is_forced, max_calls=max_calls) for _ in range(num_answers)]


def _forcing_calls(request: ChatCompletionRequest, params: SamplingParams) -> SamplingParams:
    """With a grammar for the call where the request demands one. Raises RequestError for a second demand on the text."""
    schema = forced_call_schema(request.tools or (), request.tool_choice)
    if schema is None:
        return params
    if params.structured_outputs is not None:
        raise RequestError("tool_choice and another form of the answer cannot both be demanded", param="tool_choice")
    return msgspec.structs.replace(params, structured_outputs=StructuredOutputs(json=schema, param="tool_choice"))


class _TextEvent:
    """An event that is encoded once, for all texts: what surrounds the text is kept."""

    def __init__(self, with_empty_text: bytes) -> None:
        self._before, _, self._after = with_empty_text.rpartition(b'""')

    def with_text(self, text: str) -> bytes:
        return self._before + encode_text(text) + self._after


class ChatAnswer:
    """The answer to one request. Use `full` or `events`, once. `pictures`: see `to_conversation`."""

    def __init__(
        self,
        llm: AsyncLLM,
        request: ChatCompletionRequest,
        defaults: SamplingDefaults,
        metrics: Metrics,
        pictures: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self._llm = llm
        self._request = request
        conversation, tools = to_conversation(request.messages, pictures), as_template_tools(request.tools or ())
        self._prompt = ChatPrompt(conversation, tools, request.chat_template_kwargs or {})
        self._params = _forcing_calls(request, to_sampling_params(request, defaults, llm.config.model.vocab_size))
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._tally = Tally(metrics)
        self._parsers = _tool_parsers(request, self._params.n)

    async def full(self) -> AsyncGenerator[bytes, None]:
        choices = [Choice(index, AssistantMessage(""), None, None) for index in range(self._params.n)]
        texts: list[list[str]] = [[] for _ in choices]
        calls: list[list[ToolCallDelta]] = [[] for _ in choices]
        with self._tally.timed():
            async with aclosing(self._generate()) as outputs:
                async for output in outputs:
                    self._tally.count(output)
                    for news in output.outputs:
                        calls[news.index] += self._take_calls(news)
                        texts[news.index].append(news.text)
                        self._extend(choices[news.index], news)
        for choice, text, deltas in zip(choices, texts, calls, strict=True):
            choice.message.content = "".join(text)
            if deltas:
                choice.message.content = choice.message.content or None
                choice.message.tool_calls = join_calls(deltas)
        usage = usage_of([self._tally])
        yield encode(
            ChatCompletion(id=self._id, created=self._created, model=self._request.model, choices=choices, usage=usage)
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._request.stream_options
        include_usage = options is not None and bool(options.include_usage)
        started: dict[int, _TextEvent] = {}
        try:
            with self._tally.timed():
                async with aclosing(self._generate()) as outputs:
                    async for output in outputs:
                        self._tally.count(output)
                        if events := self._events_of(output, started):
                            yield events
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, MMV1Error):
                logger.exception("A stream failed")
            yield encode_event(error_of(error)[1])
            return
        if include_usage:
            yield self._event([], usage_of([self._tally]))
        yield b"data: [DONE]\n\n"

    def _generate(self) -> AsyncGenerator[RequestOutput, None]:
        request = self._request
        return self._llm.generate(
            self._prompt,
            self._params,
            request_id=self._id,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            image_settings=NOTHING_SAID if request.mm_processor_kwargs is None else request.mm_processor_kwargs.settings(),
        )

    def _take_calls(self, news: CompletionOutput) -> list[ToolCallDelta]:
        """The news of tool calls in the answer's text, which keeps what is none, and its finish_reason, which says that there
        were some (as OpenAI's does, unless the request named the function)."""
        if not self._parsers:
            return []
        parser = self._parsers[news.index]
        news.text, calls = parser.push(news.text, last=news.finish_reason is not None)
        if news.finish_reason == "stop" and parser.num_calls and not isinstance(self._request.tool_choice, NamedToolChoice):
            news.finish_reason = "tool_calls"
        return calls

    def _extend(self, choice: Choice, news: CompletionOutput) -> None:
        logprobs = to_logprobs(news.logprobs)
        if logprobs is not None:
            if choice.logprobs is None:
                choice.logprobs = logprobs
            else:
                choice.logprobs.content += logprobs.content
        if news.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = news.finish_reason, news.stop_reason

    def _events_of(self, output: RequestOutput, started: dict[int, _TextEvent]) -> bytes:
        """The role first, then what is new; nothing for tokens that have no text yet. `started`: by answer, the event of which
        all but the text is always the same."""
        events = []
        options = self._request.stream_options
        usage: Usage | UnsetType | None = UNSET
        if options is not None and options.include_usage:
            usage = usage_of([self._tally]) if options.continuous_usage_stats else None
        for news in output.outputs:
            if news.index not in started:
                started[news.index] = _TextEvent(self._event([ChunkChoice(news.index, Delta(content=""))], usage))
                events.append(self._event([ChunkChoice(news.index, Delta(role="assistant", content=""))], usage))
            calls = self._take_calls(news)
            if news.logprobs is None and news.finish_reason is None and not calls:
                if not news.text:
                    continue
                if not isinstance(usage, Usage):  # the common case: one of thousands of small events a second
                    events.append(started[news.index].with_text(news.text))
                    continue
            delta = Delta(content=news.text) if news.text or news.logprobs is not None else Delta()
            if calls:
                delta.tool_calls = calls
            choice = ChunkChoice(news.index, delta, to_logprobs(news.logprobs), news.finish_reason)
            if news.finish_reason is not None:
                choice.stop_reason = news.stop_reason
            events.append(self._event([choice], usage))
        return b"".join(events)

    def _event(self, choices: list[ChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        return encode_event(
            ChatCompletionChunk(id=self._id, created=self._created, model=self._request.model, choices=choices, usage=usage)
        )
