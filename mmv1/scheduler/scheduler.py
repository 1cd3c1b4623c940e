"""The scheduler: one step is `{request_id: number of tokens}`, and nothing else decides.

There is no prefill and no decode here. Every request has computed some of its tokens and expects some; each pass hands out the
token budget so that the first number catches up with the second, running requests before waiting ones. Chunked prefill, mixed
batches, prefix hits and pictures are all this one rule, clipped (see encoder_inputs.py) where a picture cannot be had yet.

Steps are scheduled before the results of earlier ones are known. A token that a step in flight will sample counts as expected;
its id is on the device when the next step needs it. Results are applied in order by `update`.

Preemption is "finish and start again with the prefix cache". What this module does not know: tensors, sockets, time.
"""

from __future__ import annotations

from bisect import insort
from copy import copy
from dataclasses import dataclass, field
from itertools import chain

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.kv.manager import KVCacheManager
from mmv1.request import Request, RequestStatus
from mmv1.scheduler.encoder_inputs import Clip, Picture, clip_chunk
from mmv1.scheduler.pixels import PixelLedger
from mmv1.step import CachedRequestData, EncoderInput, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mmv1.types import (
    EngineCoreOutput,
    EngineCoreRequest,
    FeatureFailed,
    FeatureReady,
    FinishReason,
    MMFeature,
    PixelRequest,
    SchedulerStats,
)

# Both bound the host cost of a long waiting queue, per pass.
_MAX_PICTURES_AHEAD = 64  # pictures examined for encoding ahead
_MAX_PASSED_OVER = 64  # waiting requests that can get no token now


@dataclass
class _InFlight:
    """What to settle when a step has been executed."""

    references: list[tuple[Request, int, int]] = field(default_factory=list)  # request, its num_preemptions then, picture index
    encoded: list[bytes] = field(default_factory=list)


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
    ) -> None:
        self.kv = kv
        self.encoder_cache = encoder_cache
        self.pixels = pixels
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_encoder_tokens = max_num_encoder_tokens
        self._by_priority = policy == "priority"
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []  # sorted by arrival_key
        self.running: list[Request] = []  # sorted by arrival_key: the last one is the first to be preempted
        self.stats = SchedulerStats()
        self._num_arrivals = 0
        self._num_steps_scheduled = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._finished_ids: list[str] = []  # not yet told to the workers
        self._failed: list[EngineCoreOutput] = []  # not yet told to the client
        self._encoder_budget = 0
        self._encoder_inputs: list[EncoderInput] = []

    # ---- requests come and go -------------------------------------------------------------------------------------------

    def add_request(self, core_request: EngineCoreRequest) -> None:
        self._num_arrivals += 1
        key = (core_request.priority, self._num_arrivals) if self._by_priority else (self._num_arrivals,)
        request = Request(core_request, key)
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=_arrival_key)

    def abort(self, request_ids: list[str]) -> None:
        """End the listed requests without another word to the client. Unknown ids are ignored."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._finish(request)

    def pixels_ready(self, message: FeatureReady) -> None:
        self.pixels.ready(message)

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

    def _urgency(self, request_id: str, mm_hash: bytes) -> tuple[object, ...]:
        request = self.requests[request_id]
        computed = request.num_computed_tokens
        for index, feature in enumerate(request.mm_features):
            if feature.mm_hash == mm_hash and feature.offset + feature.num_tokens > computed:
                return request.status is RequestStatus.WAITING, request.arrival_key, index
        return (2,)  # passed meanwhile: not needed any more

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
            self._finished_ids.append(request.request_id)
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
            self.encoder_cache.release_all(request.request_id)
            self.pixels.forget_request(request.request_id)

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    def take_failed(self) -> list[EngineCoreOutput]:
        failed, self._failed = self._failed, []
        return failed

    # ---- one step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing to run now (what changes that is a message or a finished step)."""
        step_id = self._num_steps_scheduled + 1
        in_flight = _InFlight()
        self._encoder_budget = self.max_num_encoder_tokens
        self._encoder_inputs = []
        num_scheduled_tokens: dict[str, int] = {}
        cached = CachedRequestData([], [])
        new_requests: list[NewRequestData] = []

        budget, preempted = self._schedule_running(num_scheduled_tokens, cached, in_flight, step_id)
        if not preempted and budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            budget = self._schedule_waiting(budget, num_scheduled_tokens, new_requests, in_flight, step_id)
        self._encode_ahead(in_flight, step_id)

        if not num_scheduled_tokens and not self._encoder_inputs:
            # A preemption is a change in itself: what it freed may be all that another request waits for. It ends, since each
            # time fewer requests run.
            return self.schedule() if preempted else None
        self._num_steps_scheduled = step_id
        self._in_flight[step_id] = in_flight
        finished, self._finished_ids = self._finished_ids, []
        return SchedulerOutput(
            step_id=step_id,
            num_scheduled_tokens=num_scheduled_tokens,
            total_num_scheduled_tokens=self.max_num_batched_tokens - budget,
            new_requests=new_requests,
            cached_requests=cached,
            encoder_inputs=self._encoder_inputs,
            free_mm_hashes=self.encoder_cache.take_freed(),
            finished_request_ids=finished,
        )

    def _schedule_running(
        self, num_scheduled_tokens: dict[str, int], cached: CachedRequestData, in_flight: _InFlight, step_id: int
    ) -> tuple[int, bool]:
        """Give running requests their tokens. Returns the budget left and whether anyone was preempted.

        The loop's common case, a decoding request with room in its last block, must stay a handful of operations."""
        budget = self.max_num_batched_tokens
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
            if num_new > budget:
                num_new = budget
            clip: Clip | None = None
            if computed < request.mm_end:
                clip = self._clip(request, num_new)
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
                cached.request_ids.append(request.request_id)
                cached.new_block_ids.append(new_block_ids)
            if clip is not None:
                self._take_pictures(request, clip, num_new, in_flight, step_id)
            num_scheduled_tokens[request.request_id] = num_new
            budget -= num_new
            if computed < request.num_prompt_tokens:
                self.stats.num_prompt_tokens_computed += min(num_new, request.num_prompt_tokens - computed)
            request.num_computed_tokens = computed = computed + num_new
            if computed == expected:
                request.num_tokens_expected = expected + 1
        return budget, preempted

    def _schedule_waiting(
        self,
        budget: int,
        num_scheduled_tokens: dict[str, int],
        new_requests: list[NewRequestData],
        in_flight: _InFlight,
        step_id: int,
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
            request.num_computed_tokens = computed
            num_new = min(request.num_tokens - computed, budget)
            clip: Clip | None = None
            if computed < request.mm_end:
                clip = self._clip(request, num_new)
                num_new = clip.num_new_tokens
            block_ids = self.kv.allocate(request, computed + num_new, prefix) if num_new > 0 else []
            if not block_ids:
                request.num_computed_tokens = 0
                if block_ids is None:
                    break
                num_passed_over += 1
                continue
            if clip is not None:
                self._take_pictures(request, clip, num_new, in_flight, step_id)
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = computed
                self.stats.prefix_cache_queries += request.num_prompt_tokens
                self.stats.prefix_cache_hits += computed
            new_requests.append(_describe(request, block_ids))
            num_scheduled_tokens[request.request_id] = num_new
            budget -= num_new
            self.stats.num_prompt_tokens_computed += max(0, min(num_new, request.num_prompt_tokens - computed))
            request.num_computed_tokens = computed + num_new
            if request.num_computed_tokens == request.num_tokens_expected:
                request.num_tokens_expected += 1
            admitted.append(request)
        for request in admitted:
            request.status = RequestStatus.RUNNING
            self.waiting.remove(request)
            insort(self.running, request, key=_arrival_key)
        return budget

    def _preempt(self, request: Request) -> None:
        """Take back all its KV and let it wait again, before everyone who came later."""
        self.running.remove(request)
        self._finished_ids.append(request.request_id)
        self._release(request)
        request.reset_for_preemption()
        insort(self.waiting, request, key=_arrival_key)
        self.stats.num_preemptions += 1

    # ---- pictures -------------------------------------------------------------------------------------------------------

    def _state_of(self, mm_hash: bytes) -> Picture:
        if mm_hash in self.encoder_cache:
            return Picture.HELD if self.encoder_cache.is_referenced(mm_hash) else Picture.CACHED
        state = self.pixels.get(mm_hash)
        return Picture.READY if state is not None and state.is_ready else Picture.MISSING

    def _clip(self, request: Request, num_new: int) -> Clip:
        clip = clip_chunk(
            request.mm_features,
            request.num_computed_tokens,
            num_new,
            state_of=self._state_of,
            size_of=self.encoder_cache.size_of,
            available_bytes=self.encoder_cache.available_bytes,
            encoder_budget=self._encoder_budget,
        )
        wanted = clip.to_encode if clip.blocked_by is None else [*clip.to_encode, clip.blocked_by]
        for index in wanted:
            feature = request.mm_features[index]
            if feature.mm_hash not in self.encoder_cache:
                self.pixels.want(feature, request.request_id, ahead=False)
        return clip

    def _take_pictures(self, request: Request, clip: Clip, num_new: int, in_flight: _InFlight, step_id: int) -> None:
        """Commit a clip: reference what the chunk touches, encode what is to be encoded. What is cached is referenced first,
        so that making room for one picture never evicts another of the same chunk."""
        cache, features = self.encoder_cache, request.mm_features
        end = request.num_computed_tokens + num_new
        to_encode = set(clip.to_encode)
        for index in sorted(clip.to_reference, key=lambda i: features[i].mm_hash not in cache):
            feature = features[index]
            if index in to_encode:
                cache.allocate(feature.mm_hash, feature.num_tokens, request.request_id)
                self._add_encoder_input(feature, in_flight, step_id)
            is_hit = cache.reference(feature.mm_hash, request.request_id, index)
            if is_hit is not None:
                self.stats.encoder_cache_queries += 1
                self.stats.encoder_cache_hits += is_hit
            if end >= feature.offset + feature.num_tokens:
                in_flight.references.append((request, request.num_preemptions, index))

    def _add_encoder_input(self, feature: MMFeature, in_flight: _InFlight, step_id: int) -> None:
        state = self.pixels.encoding(feature.mm_hash, step_id)
        self._encoder_inputs.append(
            EncoderInput(feature.mm_hash, state.offset, state.nbytes, feature.grid_thw, feature.num_tokens)
        )
        in_flight.encoded.append(feature.mm_hash)
        self._encoder_budget -= feature.num_tokens
        self.stats.num_images_encoded += 1

    def _encode_ahead(self, in_flight: _InFlight, step_id: int) -> None:
        """Look ahead: ask for the pixels of pictures that requests will come to, in the order they will, and encode those
        whose pixels are here with what is left of the budget, into room that nobody else asked for."""
        cache = self.encoder_cache
        examined = 0
        for request in chain(self.running, self.waiting):
            covered = request.num_computed_tokens
            if covered >= request.mm_end:
                continue
            for feature in request.mm_features:
                end = feature.offset + feature.num_tokens
                if end <= covered:
                    continue
                if feature.mm_hash not in cache and covered == 0 and request.status is RequestStatus.WAITING:
                    covered = len(self.kv.find_prefix(request)) * self.kv.block_size
                    if end <= covered:
                        continue
                examined += 1
                if examined > _MAX_PICTURES_AHEAD:
                    return
                if feature.mm_hash in cache or self._try_encode_ahead(request, feature, in_flight, step_id):
                    cache.reserve(feature.mm_hash, request.request_id)

    def _try_encode_ahead(self, request: Request, feature: MMFeature, in_flight: _InFlight, step_id: int) -> bool:
        state = self.pixels.want(feature, request.request_id, ahead=True)
        if state is None or not state.is_ready or feature.num_tokens > self._encoder_budget:
            return False
        if self.encoder_cache.size_of(feature.num_tokens) > self.encoder_cache.ahead_bytes:
            return False
        self.encoder_cache.allocate(feature.mm_hash, feature.num_tokens, request.request_id)
        self._add_encoder_input(feature, in_flight, step_id)
        return True

    # ---- results --------------------------------------------------------------------------------------------------------

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Apply the oldest step in flight. A token sampled for a request that ended meanwhile is dropped."""
        self._settle(self._in_flight.pop(step.step_id), step.step_id)
        requests, logprobs = self.requests, result.logprobs
        outputs: list[EngineCoreOutput] = []
        finished: list[Request] = []
        for request_id, token_id in zip(result.request_ids, result.sampled_token_ids, strict=True):
            request = requests.get(request_id)
            if request is None:
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

    def _settle(self, in_flight: _InFlight, step_id: int) -> None:
        for mm_hash in in_flight.encoded:
            self.pixels.encoded(mm_hash, step_id)
        for request, num_preemptions, index in in_flight.references:
            # A preempted request let go of everything; what it may have taken since is not this step's to drop.
            if request.num_preemptions == num_preemptions:
                self.encoder_cache.release(request.mm_features[index].mm_hash, request.request_id, index)

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

    def check_integrity(self) -> None:
        """Raise if the ledgers contradict themselves; with no request left, if anything is still held."""
        self.kv.check_integrity()
        self.encoder_cache.check_integrity()
        self.pixels.check_integrity()
        held = self.kv.num_used_blocks or self.encoder_cache.num_references or self.pixels.num_pending
        if held and not self.requests and not self._in_flight:
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
    )
