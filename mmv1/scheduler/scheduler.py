"""The scheduler: one step is `{request_id: number of tokens}`, and nothing else decides.

There is no prefill and no decode here. Every request has computed some of its tokens and expects some; each pass hands out the
token budget so that the first number catches up with the second, running requests before waiting ones. Chunked prefill, mixed
batches, prefix hits and pictures are all this one rule, clipped (see clip.py) where a picture's embedding is not there yet.
Pictures are encoded beside the steps, by batches of their own (see encoding.py).

Steps are scheduled before the results of earlier ones are known. A token that a step in flight will sample counts as expected;
its id is on the device when the next step needs it. A request that follows a grammar is the exception: what may come next
depends on its newest token, so it sits out the steps until that is known. Results are applied in order by `update`.

Preemption is "finish and start again with the prefix cache". What this module does not know: tensors, sockets, time.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from copy import copy
from itertools import chain

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.kv.manager import KVCacheManager
from mmv1.request import Request, RequestStatus, TokenMatcher
from mmv1.scheduler.clip import Clip, clip_chunk
from mmv1.scheduler.encoding import MAX_PICTURES_AHEAD, EncodeScheduler
from mmv1.scheduler.pixels import PixelLedger
from mmv1.step import CachedRequestData, EncodeBatch, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mmv1.types import (
    EngineCoreOutput,
    EngineCoreRequest,
    FeatureFailed,
    FeatureReady,
    FinishReason,
    PixelRequest,
    SchedulerStats,
)

_MAX_PASSED_OVER = 64  # waiting requests that can get no token now: bounds the host cost of a long waiting queue, per pass


class Scheduler:
    """Numbers are per step unless said otherwise."""

    def __init__(
        self,
        kv: KVCacheManager,
        encoder_cache: EncoderCacheManager,
        pixels: PixelLedger,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_encoder_tokens: int,
        policy: str = "fcfs",
        chunked_prefill: bool = True,
        keeps_embeddings: bool = True,
        max_followed_tokens: int = 0,
    ) -> None:
        self.kv = kv
        self.encoder_cache = encoder_cache
        self.pixels = pixels
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.encoding = EncodeScheduler(
            kv, encoder_cache, pixels, max_num_encoder_tokens,
            keeps_embeddings=keeps_embeddings, max_followed_tokens=max_followed_tokens,
        )  # fmt: skip
        self._chunked_prefill = chunked_prefill
        self._by_priority = policy == "priority"
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []  # sorted by arrival_key
        self.running: list[Request] = []  # sorted by arrival_key: the last one is the first to be preempted
        self.stats = SchedulerStats()
        self._num_arrivals = 0
        self._num_steps_scheduled = 0
        self._in_flight: dict[int, list[bytes]] = {}  # step_id -> the pictures it reads, which it holds referenced
        self._finished_ids: list[str] = []  # not yet told to the workers
        self._unknown_ids: set[str] = set()  # running requests whose end was told, and that are not yet described again
        self._failed: list[EngineCoreOutput] = []  # not yet told to the client

    # ---- requests come and go -------------------------------------------------------------------------------------------

    def add_request(self, core_request: EngineCoreRequest, grammar: TokenMatcher | None = None) -> None:
        """`grammar`: what the answer must follow, at its beginning."""
        self._num_arrivals += 1
        key = (core_request.priority, self._num_arrivals) if self._by_priority else (self._num_arrivals,)
        request = Request(core_request, key, grammar)
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=_arrival_key)
        if request.mm_features:
            self.encoding.changed = True
            if not self._chunked_prefill and not self._pictures_fit(request):
                message = "without chunked prefill all pictures of a prompt must fit in the encoder cache together"
                self._fail(request, message, "too_many_images")

    def _pictures_fit(self, request: Request) -> bool:
        size_of = {f.mm_hash: self.encoder_cache.size_of(f.num_tokens) for f in request.mm_features}
        return sum(size_of.values()) <= self.encoder_cache.capacity_bytes and len(request.mm_features) <= MAX_PICTURES_AHEAD

    def abort(self, request_ids: list[str]) -> None:
        """End the listed requests without another word to the client. Unknown ids are ignored."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._finish(request)

    def pixels_ready(self, message: FeatureReady) -> None:
        if self.pixels.ready(message):
            self.encoding.changed = True

    def pixels_failed(self, message: FeatureFailed) -> None:
        """End every request that still needs the picture. One that has computed past it no longer does."""
        for request_id in self.pixels.failed(message):
            request = self.requests[request_id]
            ends = [f.offset + f.num_tokens for f in request.mm_features if f.mm_hash == message.mm_hash]
            if request.num_computed_tokens < max(ends):
                self._fail(request, message.message, message.code)

    def slab_short(self) -> None:
        """A picture has been waiting for room in the slab. Room is made for the next picture of the oldest request that holds
        KV, else of the first that waits: that request can then go on, whatever else the slab was full of."""
        self.pixels.make_room(self._urgency)
        self.encoding.changed = True

    def _urgency(self, request_id: str, mm_hash: bytes) -> tuple[object, ...]:
        """The order of need, as in encoding.py."""
        request = self.requests[request_id]
        covered = self.encoding.num_covered_tokens(request)
        for index, feature in enumerate(request.mm_features):
            if feature.mm_hash == mm_hash and feature.offset + feature.num_tokens > covered:
                return request.status is RequestStatus.WAITING, request.arrival_key, index
        return (2,)  # passed, or found in the prefix cache meanwhile: not needed any more

    def _fail(self, request: Request, error: str, code: str) -> None:
        self._failed.append(
            EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, error=error, error_code=code)
        )
        self._finish(request)

    def _finish(self, request: Request) -> None:
        """Let go of everything the request holds. Steps in flight may still write to its blocks: they run before any step
        that could hand the blocks to someone else."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._forget_at_workers(request)
            # The KV of all but the newest token is computed, or will be by the steps in flight.
            self.kv.publish(request, min(request.num_computed_tokens, request.num_tokens - 1))
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self._release(request)
        del self.requests[request.request_id]

    def _release(self, request: Request) -> None:
        self.kv.free(request)
        if request.mm_features:
            self.pixels.forget_request(request.request_id)
            self.encoding.changed = True

    def _forget_at_workers(self, request: Request) -> None:
        if request.request_id in self._unknown_ids:
            self._unknown_ids.discard(request.request_id)
        else:
            self._finished_ids.append(request.request_id)

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    def take_failed(self) -> list[EngineCoreOutput]:
        failed, self._failed = self._failed, []
        return failed

    # ---- one step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing to run now (what changes that is a message or a finished step).

        With nothing else to run, and no step in flight, it may be one that reads pictures of batches in flight, and is executed
        behind them: it is then launched while they are encoded, instead of afterwards. Only behind batches of at most
        `max_followed_tokens` together, for whatever comes meanwhile has to wait for them too."""
        step = self._schedule(self.encoder_cache.is_complete)
        if step is None and self.encoding.may_be_followed and not self._in_flight:
            step = self._schedule(self.encoder_cache.__contains__)  # what is not complete is being encoded
        return step

    def _schedule(self, is_there: Callable[[bytes], bool]) -> SchedulerOutput | None:
        """`is_there`: may a picture's embedding be read?"""
        step = SchedulerOutput(
            step_id=self._num_steps_scheduled + 1,
            num_scheduled_tokens={},
            total_num_scheduled_tokens=0,
            new_requests=[],
            cached_requests=CachedRequestData([], []),
            finished_request_ids=[],
        )
        pictures: list[bytes] = []
        budget, preempted = self._schedule_running(step, pictures, is_there)
        if not preempted and budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            budget = self._schedule_waiting(step, pictures, is_there, budget)
        if not step.num_scheduled_tokens:
            # A preemption is a change in itself: what it freed may be all that another request waits for. It ends, since each
            # time fewer requests run.
            return self._schedule(is_there) if preempted else None
        self._num_steps_scheduled = step.step_id
        self._in_flight[step.step_id] = pictures
        step.total_num_scheduled_tokens = self.max_num_batched_tokens - budget
        step.finished_request_ids, self._finished_ids = self._finished_ids, []
        step.after_batch = max((self.encoding.batch_of.get(mm_hash, 0) for mm_hash in pictures), default=0)
        return step

    def _schedule_running(
        self, step: SchedulerOutput, pictures: list[bytes], is_there: Callable[[bytes], bool]
    ) -> tuple[int, bool]:
        """Give running requests their tokens. Returns the budget left and whether anyone was preempted.

        The loop's common case, a decoding request with room in its last block, must stay a handful of operations."""
        budget = self.max_num_batched_tokens
        num_scheduled_tokens = step.num_scheduled_tokens
        preempted = False
        running = self.running
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            index += 1
            expected = request.num_tokens_expected
            computed = request.num_computed_tokens
            num_new = expected - computed
            if num_new <= 0 or expected >= request.max_total_tokens:
                continue  # nothing to compute, or its last token is on its way
            if expected > request.num_tokens and request.grammar is not None:
                continue  # what may follow the token in flight is known when that is
            if num_new > budget:
                num_new = budget
            clip: Clip | None = None
            if computed < request.mm_end:
                if self.kv.finds_more(request):
                    self._adopt_prefix(request)
                    computed = request.num_computed_tokens
                clip = clip_chunk(request.mm_features, computed, min(expected - computed, budget), is_there)
                num_new = clip.num_new_tokens
                if num_new <= 0:
                    continue
            if computed + num_new > request.kv_capacity:
                new_block_ids = self.kv.allocate(request, computed + num_new)
                while new_block_ids is None and running[-1] is not request:
                    self._preempt(running[-1])
                    preempted = True
                    new_block_ids = self.kv.allocate(request, computed + num_new)
                if new_block_ids is None:
                    self._preempt(request)
                    preempted = True
                    break
                self._tell_blocks(step, request, new_block_ids)
            if clip is not None:
                self._reference(request, clip, pictures)
            num_scheduled_tokens[request.request_id] = num_new
            budget -= num_new
            if computed < request.num_prompt_tokens:
                self.stats.num_prompt_tokens_computed += min(num_new, request.num_prompt_tokens - computed)
            request.num_computed_tokens = computed = computed + num_new
            if computed == expected:
                self._expect_token(step, request)
        return budget, preempted

    def _expect_token(self, step: SchedulerOutput, request: Request) -> None:
        """The step samples for the request."""
        request.num_tokens_expected += 1
        if request.grammar is not None:
            step.token_masks[request.request_id] = request.grammar.mask()

    def _tell_blocks(self, step: SchedulerOutput, request: Request, new_block_ids: list[int]) -> None:
        if request.request_id in self._unknown_ids:
            self._unknown_ids.discard(request.request_id)
            step.new_requests.append(_describe(request, self.kv.block_ids(request)))
        else:
            step.cached_requests.request_ids.append(request.request_id)
            step.cached_requests.new_block_ids.append(new_block_ids)

    def _adopt_prefix(self, request: Request) -> None:
        """Go on behind what others have computed of this prompt since the request began. Requests with the same beginning wait
        for the same picture, and would all compute it. For the workers it ends, and starts again there."""
        prefix = self.kv.find_prefix(request)
        covered = len(prefix) * self.kv.block_size
        gained = covered - request.num_computed_tokens
        if gained <= 0:
            return
        self.kv.adopt(request, prefix)
        request.num_computed_tokens = covered
        num_cached_tokens = min(request.num_prompt_tokens, request.num_cached_tokens + gained)
        self.stats.prefix_cache_hits += num_cached_tokens - request.num_cached_tokens
        request.num_cached_tokens = num_cached_tokens
        if request.request_id not in self._unknown_ids:
            self._finished_ids.append(request.request_id)
            self._unknown_ids.add(request.request_id)
        self.encoding.changed = True

    def _schedule_waiting(
        self, step: SchedulerOutput, pictures: list[bytes], is_there: Callable[[bytes], bool], budget: int
    ) -> int:
        """Admit waiting requests in order, each with its longest cached prefix. One that can get no token now is passed over;
        one that finds no KV blocks ends the pass, so that nobody starves behind smaller requests. Returns the budget left."""
        admitted: list[Request] = []
        num_passed_over = 0
        for request in self.waiting:
            if budget <= 0 or len(self.running) + len(admitted) >= self.max_num_seqs or num_passed_over > _MAX_PASSED_OVER:
                break
            if request.num_tokens_expected > request.num_tokens:
                continue  # preempted with a token in flight: its id is not known yet
            prefix = self.kv.find_prefix(request)
            computed = len(prefix) * self.kv.block_size
            num_whole = request.num_tokens - computed
            if not self._chunked_prefill and num_whole > budget:
                break  # its turn comes when the steps of others leave room for all of it
            request.num_computed_tokens = computed
            num_new = min(num_whole, budget)
            clip: Clip | None = None
            if computed < request.mm_end:
                clip = clip_chunk(request.mm_features, computed, num_new, is_there)
                num_new = clip.num_new_tokens if self._chunked_prefill or clip.num_new_tokens == num_whole else 0
            block_ids = self.kv.allocate(request, computed + num_new, prefix) if num_new > 0 else []
            if not block_ids:
                request.num_computed_tokens = 0
                if block_ids is None:
                    break
                num_passed_over += 1
                continue
            if clip is not None:
                self._reference(request, clip, pictures)
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = computed
                self.stats.prefix_cache_queries += request.num_prompt_tokens
                self.stats.prefix_cache_hits += computed
            step.new_requests.append(_describe(request, block_ids))
            step.num_scheduled_tokens[request.request_id] = num_new
            budget -= num_new
            self.stats.num_prompt_tokens_computed += max(0, min(num_new, request.num_prompt_tokens - computed))
            request.num_computed_tokens = computed + num_new
            if request.num_computed_tokens == request.num_tokens_expected:
                self._expect_token(step, request)
            admitted.append(request)
        for request in admitted:
            request.status = RequestStatus.RUNNING
            self.waiting.remove(request)
            insort(self.running, request, key=_arrival_key)
            if request.mm_features:
                self.encoding.changed = True
        return budget

    def _preempt(self, request: Request) -> None:
        """Take back all its KV and let it wait again, before everyone who came later."""
        self.running.remove(request)
        self._forget_at_workers(request)
        self._release(request)
        request.reset_for_preemption()
        insort(self.waiting, request, key=_arrival_key)
        self.stats.num_preemptions += 1

    # ---- pictures -------------------------------------------------------------------------------------------------------

    def _reference(self, request: Request, clip: Clip, pictures: list[bytes]) -> None:
        """The step reads what the chunk touches, until it has been executed: whether or not the request lives that long, its
        blocks are findable by then, and what they hold must be right."""
        for index in clip.touched:
            feature = request.mm_features[index]
            is_hit = self.encoder_cache.reference(feature.mm_hash, request.request_id)
            pictures.append(feature.mm_hash)
            if feature.offset >= request.num_computed_tokens or request.status is RequestStatus.WAITING:  # its first chunk
                self.stats.encoder_cache_queries += 1
                self.stats.encoder_cache_hits += is_hit

    def schedule_encode(self) -> EncodeBatch | None:
        """The next encode batch, or None when there is none to run now. Cheap when nothing has changed since the last None."""
        batch = self.encoding.schedule(chain(self.running, self.waiting))
        if batch is not None:
            self.stats.num_images_encoded += len(batch.inputs)
        return batch

    def update_encode(self, batch: EncodeBatch) -> None:
        """Apply a batch that is done. The order among batches, and with steps, is free."""
        self.encoding.update(batch)

    # ---- results --------------------------------------------------------------------------------------------------------

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Apply the oldest step in flight. A token sampled for a request that ended meanwhile is dropped."""
        pictures = self._in_flight.pop(step.step_id)
        if pictures:
            for mm_hash in pictures:
                self.encoder_cache.release(mm_hash)
            self.encoding.changed = True
        requests, logprobs = self.requests, result.logprobs
        outputs: list[EngineCoreOutput] = []
        finished: list[Request] = []
        for request_id, token_id in zip(result.request_ids, result.sampled_token_ids, strict=True):
            request = requests.get(request_id)
            if request is None:
                continue
            if request.grammar is not None and not request.grammar.advance(token_id):
                self._fail(request, f"the answer cannot go on: {request.grammar.error}", "grammar_failed")
                continue
            output = EngineCoreOutput(request_id, [token_id])
            reason = request.append(token_id)
            if logprobs is not None and request_id in logprobs:
                output.new_logprobs = [logprobs[request_id]]
            if request.num_tokens == request.num_prompt_tokens + 1:
                output.num_cached_tokens = request.num_cached_tokens
            if reason is not None:
                output.finish_reason = reason
                if reason is FinishReason.STOP:
                    output.stop_reason = request.stop_reason(token_id)
                finished.append(request)
            outputs.append(output)
        for request in finished:
            self._finish(request)
        self.stats.num_steps += 1
        self.stats.num_generation_tokens += len(outputs)
        return outputs

    def take_pixel_messages(self) -> tuple[list[PixelRequest], list[bytes]]:
        return self.pixels.take_messages()

    def snapshot(self) -> SchedulerStats:
        """A copy of the counters, with the gauges read now."""
        stats = copy(self.stats)
        stats.num_running, stats.num_waiting = len(self.running), len(self.waiting)
        stats.num_kv_blocks, stats.num_kv_blocks_used = self.kv.pool.num_usable, self.kv.num_used_blocks
        stats.encoder_cache_bytes = self.encoder_cache.used_bytes
        stats.encoder_cache_capacity_bytes = self.encoder_cache.capacity_bytes
        stats.num_pixel_requests = self.pixels.num_requests
        return stats

    def reset_caches(self) -> None:
        """Forget every unreferenced KV block and embedding."""
        self.kv.pool.forget_unreferenced()
        self.encoder_cache.forget_unreferenced()
        self.encoding.changed = True

    def check_integrity(self) -> None:
        """Raise if the ledgers contradict themselves; with no request left, if anything is still held."""
        self.kv.check_integrity()
        self.encoding.check_integrity()
        self.pixels.check_integrity()
        held = self.kv.num_used_blocks or self.encoder_cache.num_held or self.pixels.num_pending or self._unknown_ids
        if held and not self.requests and not self._in_flight and not self.encoding.num_in_flight:
            raise RuntimeError("something is still held although every request has ended")


def _arrival_key(request: Request) -> tuple[int, ...]:
    return request.arrival_key


def _describe(request: Request, block_ids: list[int]) -> NewRequestData:
    return NewRequestData(
        request_id=request.request_id,
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        mm_features=request.mm_features,
        sampling_params=request.sampling_params,
        block_ids=block_ids,
        num_computed_tokens=request.num_computed_tokens,
        eos_token_ids=request.eos_token_ids,
    )
