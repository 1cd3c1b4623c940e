"""AsyncLLM: the engine as an event loop sees it. The server and the offline `LLM` are both thin layers over this.

It joins three parts and knows none of their insides: the preprocessor (prompts and pixels), the engine's client, and the
output processor (tokens to text). One request is: prepare, add, read deltas, let go.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec
from tokenizers import Tokenizer

from mmv1.config import EngineConfig
from mmv1.engine.client import EngineClient
from mmv1.engine.output_processor import CompletionDelta, CompletionOutput, OutputProcessor, RequestOutput
from mmv1.engine.sampling import check_sampling_params, resolve_tokens
from mmv1.errors import ConfigError, ContextLengthError, EngineDeadError, EngineError, MMV1Error, RequestError, ShuttingDownError
from mmv1.log import logger
from mmv1.preprocess.image_settings import NOTHING_SAID, ImageSettings
from mmv1.preprocess.media import ImageSource
from mmv1.preprocess.preprocessor import PreparedPrompt, Preprocessor
from mmv1.preprocess.prompt import Message
from mmv1.scheduler.grammar import Grammars
from mmv1.types import Abort, EngineCoreOutputs, EngineCoreRequest, EngineReady, ResetCaches, SamplingParams, SchedulerStats


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt without a chat template: text in which special tokens mean themselves, or token ids; one placeholder a picture.
    `add_special_tokens`: before a text comes what the tokenizer puts before every text."""

    prompt: str | Sequence[int]
    images: Sequence[ImageSource] = ()
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, the tools that the chat template shows to the model (each {"type": "function", "function": {...}}), and
    values of the template's own variables."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    template_settings: Mapping[str, Any] = field(default_factory=dict)


Prompt = Sequence[Message] | ChatPrompt | RawPrompt


class AsyncLLM:
    """All methods on one event loop. `start` before anything else, `close` at the end."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.ready: EngineReady | None = None
        self._client = EngineClient(self._take_outputs, self._end_all)
        self.preprocessor = Preprocessor(config.model, config.preprocess, self._client.send, on_failure=self._pool_failed)
        if self.tokenizer.get_vocab_size(with_added_tokens=True) > config.model.vocab_size:
            raise ConfigError("tokenizer.json has more tokens than config.json's vocab_size: they are not of one model")
        self._outputs = OutputProcessor(self.preprocessor.tokenizer)
        self._grammars = Grammars.of_model(config.model)
        self._streams: dict[str, _Stream] = {}
        self._stats = SchedulerStats()
        self._death: str | None = None
        self._serials = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.preprocessor.tokenizer

    @property
    def is_ready(self) -> bool:
        """Started, and not dead."""
        return self.ready is not None and self._death is None

    @property
    def max_model_len(self) -> int:
        return self.ready.max_model_len if self.ready is not None else self.config.model.max_model_len

    @property
    def engine_pid(self) -> int | None:
        return self._client.pid

    async def start(self) -> EngineReady:
        """Start the pool and the engine in parallel; both are ready when this returns. Raises ConfigError, EngineDeadError."""
        self._loop = asyncio.get_running_loop()
        try:
            await self.preprocessor.start()
            self.ready = await self._client.start(self.config, self.preprocessor.slab.fd)
            await self.preprocessor.wait_ready()
        except BaseException:
            await self.close()
            raise
        return self.ready

    async def close(self) -> None:
        """End every request, then the processes."""
        self._end_all("the server is shutting down", log=False)
        await self._client.close()
        await self.preprocessor.close()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        image_settings: ImageSettings = NOTHING_SAID,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Deltas of the answers, merged over the n of them, until all are finished. Closing it ends the request.
        `image_settings` are for all pictures that do not say otherwise. Requests with different `cache_salt` share nothing that
        is kept: no KV, no embeddings, no pictures.

        Raises, before the first delta, RequestError (with ImageError and ContextLengthError) for what the request is at fault
        for, pictures included, and at any time EngineDeadError.
        """
        request_id = request_id or uuid.uuid4().hex
        self._raise_if_dead()
        if request_id in self._streams:
            raise RequestError("a request with this id is running", code="duplicate_request_id")
        stream = self._streams[request_id] = _Stream(request_id, sampling_params.n)
        core_ids: list[str] = []
        try:
            params = resolve_tokens(check_sampling_params(sampling_params), self.tokenizer, self.config.model.vocab_size)
            if params.structured_outputs is not None:
                await asyncio.wrap_future(self._grammars.check(params.structured_outputs))
            prepared = await self._prepare(request_id, prompt, params, image_settings, cache_salt.encode())
            requests = self._core_requests(request_id, prepared, params, priority, cache_salt)
            self._raise_if_dead()
            for index, request in enumerate(requests):
                core_ids.append(request.request_id)
                self._outputs.add_request(request, parent_id=request_id, index=index, emit=stream.emit)
                self._client.send(request)
            num_image_tokens = prepared.num_image_tokens
            while not stream.finished:
                output = await stream.next()
                output.prompt_token_ids = prepared.prompt_token_ids
                output.num_image_tokens = num_image_tokens
                yield output
            core_ids.clear()
        finally:
            del self._streams[request_id]
            if core_ids:
                self._outputs.abort(core_ids)
                self._client.send(Abort(core_ids))
            self.preprocessor.release_request(request_id)

    async def tokenize(
        self, prompt: Prompt, *, cache_salt: str = "", image_settings: ImageSettings = NOTHING_SAID
    ) -> list[int]:
        """The token ids that `generate` would compute, of whatever length, with every picture's placeholder expanded. Raises
        RequestError."""
        if isinstance(prompt, RawPrompt) and prompt.prompt == "":
            return self.preprocessor.text_token_ids("", add_special_tokens=prompt.add_special_tokens)
        request_id = uuid.uuid4().hex
        try:
            prepared = await self._prepare_within(sys.maxsize, request_id, prompt, image_settings, cache_salt.encode())
        finally:
            self.preprocessor.release_request(request_id)
        return prepared.prompt_token_ids

    async def _prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, image_settings: ImageSettings, scope: bytes
    ) -> PreparedPrompt:
        """Raises RequestError, for a prompt that leaves no room for the answer before any picture of it is downloaded."""
        room = self.max_model_len - (params.max_tokens or 1)
        if room < 1:
            message = f"max_tokens {params.max_tokens} leaves no room for a prompt in the model's {self.max_model_len} tokens"
            raise ContextLengthError(message, param="max_tokens")
        return await self._prepare_within(room, request_id, prompt, image_settings, scope)

    async def _prepare_within(
        self, room: int, request_id: str, prompt: Prompt, image_settings: ImageSettings, scope: bytes
    ) -> PreparedPrompt:
        if isinstance(prompt, RawPrompt):
            return await self.preprocessor.prepare_prompt(
                request_id, prompt.prompt, prompt.images, image_settings,
                add_special_tokens=prompt.add_special_tokens, max_prompt_tokens=room, tenant_scope=scope,
            )  # fmt: skip
        chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(prompt)
        return await self.preprocessor.prepare_chat(
            request_id, chat.messages, image_settings, tools=chat.tools, template_settings=chat.template_settings,
            max_prompt_tokens=room, tenant_scope=scope,
        )  # fmt: skip

    def _core_requests(
        self, request_id: str, prepared: PreparedPrompt, params: SamplingParams, priority: int, cache_salt: str
    ) -> list[EngineCoreRequest]:
        """One core request for each of the n answers; they share the prompt's KV through the prefix cache."""
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prepared.prompt_token_ids,
            mm_features=prepared.mm_features,
            sampling_params=params,
            max_tokens=params.max_tokens or self.max_model_len - len(prepared.prompt_token_ids),
            # A grammar that is complete allows end-of-sequence alone: the answer then ends, whatever it was to ignore.
            eos_token_ids=() if params.ignore_eos and not params.structured_outputs else self.config.model.eos_token_ids,
            cache_salt=cache_salt.encode(),
            priority=priority,
        )
        # An id of its own for every admission: late news of an earlier request with the same id cannot reach this one.
        replace, serial = msgspec.structs.replace, next(self._serials)
        return [
            replace(request, request_id=f"{request_id}/{serial}/{index}", sampling_params=_for_answer(params, index))
            for index in range(params.n)
        ]

    def _take_outputs(self, outputs: EngineCoreOutputs) -> None:
        """The core's news, on the event loop. Releases go before requests (see PixelLedger.take_messages)."""
        if outputs.stats is not None:
            self._stats = outputs.stats
        for mm_hash in outputs.pixel_releases:
            self.preprocessor.release_pixels(mm_hash)
        for request in outputs.pixel_requests:
            self.preprocessor.request_pixels(request)
        if outputs.outputs and (stopped := self._outputs.process(outputs.outputs)):
            self._client.send(Abort(stopped))

    def _end_all(self, reason: str, *, log: bool = True) -> None:
        """Nothing can be generated any more: every request ends with an error."""
        if self._death is None:
            self._death = reason
            if log and self._streams:
                logger.error("%d requests end unfinished: %s", len(self._streams), reason)
        for stream in self._streams.values():
            stream.fail(EngineDeadError(reason))

    def _pool_failed(self, reason: str) -> None:
        """Called from any thread."""
        self._loop.call_soon_threadsafe(self._end_all, reason)

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    async def check_health(self) -> None:
        """Raises EngineDeadError unless the step loop answers now, no step hangs and the pool is alive."""
        self._raise_if_dead()
        await self._client.check_health()

    def stats(self) -> SchedulerStats:
        """The engine's newest counters."""
        return self._stats

    async def refresh_stats(self) -> SchedulerStats:
        """The engine's counters as of now."""
        self._raise_if_dead()
        await self._client.ping()
        return self._stats

    async def profile(self, *, start: bool) -> None:
        """Start to record a trace of the engine, or stop and write it. Raises RequestError when it is already so, or when the
        settings name no directory for traces."""
        trace_dir = self.config.device.torch_profiler_dir
        if trace_dir is None:
            raise RequestError("this server was started without --torch-profiler-dir", code="no_profiler", status=404)
        self._raise_if_dead()
        try:
            await self._client.profile(trace_dir if start else None)
        except EngineDeadError:
            raise
        except EngineError as error:
            raise RequestError(str(error), code="profile_failed", status=409) from error

    def end_requests(self) -> None:
        """End every request that runs, with ShuttingDownError after the text that it has."""
        for stream in self._streams.values():
            stream.fail(ShuttingDownError("the server is shutting down"))

    def reset_caches(self) -> None:
        """Make the engine forget every unreferenced KV block and embedding (benchmarks and tests)."""
        self._client.send(ResetCaches())


def _for_answer(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of n answers: a seed gives n different, reproducible ones."""
    if params.n == 1:
        return params
    return msgspec.structs.replace(params, n=1, seed=None if params.seed is None else params.seed + index)


class _Stream:
    """What one request's reader has not read yet. A reader that falls behind reads more at once; nothing piles up but text."""

    def __init__(self, request_id: str, num_answers: int) -> None:
        self._request_id = request_id
        self._num_open = num_answers
        self._deltas: list[CompletionDelta] = []
        self._error: MMV1Error | None = None
        self._reader: asyncio.Future[None] | None = None  # set by a reader that waits
        self.finished = False

    def emit(self, delta: CompletionDelta) -> None:
        if delta.error is not None:
            self.fail(delta.error)
            return
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: MMV1Error) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def next(self) -> RequestOutput:
        """All that is new, waiting for the first of it. Raises the request's error once its text has been read."""
        if not self._deltas and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        deltas, self._deltas = self._deltas, []
        if not deltas and self._error is not None:
            raise self._error
        by_answer: dict[int, list[CompletionOutput]] = {}
        num_cached_tokens = 0
        for delta in deltas:
            output = delta.output
            by_answer.setdefault(output.index, []).append(output)
            self._num_open -= output.finish_reason is not None
            # Of n answers the later ones find the first one's fresh blocks: only the first says what was there before.
            if output.index == 0 and delta.num_cached_tokens > num_cached_tokens:
                num_cached_tokens = delta.num_cached_tokens
        self.finished = self._num_open == 0
        outputs = [merge_outputs(parts) for parts in by_answer.values()]
        return RequestOutput(self._request_id, outputs, deltas[0].num_prompt_tokens, num_cached_tokens, self.finished)


def merge_outputs(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    """Successive deltas of one answer as one."""
    if len(parts) == 1:
        return parts[0]
    with_logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionOutput(
        parts[0].index,
        "".join(part.text for part in parts),
        list(chain.from_iterable(part.token_ids for part in parts)),
        list(chain.from_iterable(with_logprobs)) if with_logprobs else None,
        parts[-1].finish_reason,
        parts[-1].stop_reason,
    )
