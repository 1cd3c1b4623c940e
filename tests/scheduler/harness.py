"""Drives a Scheduler against the simulated worker, with pixels that take a while, for property tests."""

from __future__ import annotations

import random
from collections import deque

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.manager import KVCacheManager
from mmv1.scheduler.pixels import PixelLedger
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import ENCODER_CACHE_PAGE_ROWS, ModelRunnerOutput, SchedulerOutput
from mmv1.types import EngineCoreRequest, FeatureFailed, FeatureReady, FinishReason
from tests.simulation import SimulatedWorker


class Harness:
    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        encoder_pages: int = 8,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_num_encoder_tokens: int = 64,
        policy: str = "fcfs",
        prefix_caching: bool = True,
        depth: int = 2,
        max_ahead_patches: int = 100_000,
        seed: int = 0,
        poison: frozenset[bytes] = frozenset(),
        slots: int = 1_000_000,
    ) -> None:
        self.rng = random.Random(seed)
        self.worker = SimulatedWorker(num_blocks, block_size, encoder_pages)
        self.scheduler = Scheduler(
            KVCacheManager(num_blocks, block_size, BlockHasher(block_size) if prefix_caching else None),
            EncoderCacheManager(encoder_pages * ENCODER_CACHE_PAGE_ROWS, bytes_per_token=1),
            PixelLedger(max_ahead_patches),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_encoder_tokens=max_num_encoder_tokens,
            policy=policy,
        )
        self.depth = depth
        self.poison = poison
        self.slots = slots  # pictures the slab holds at a time; further ones wait their turn, in order
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.asked: dict[bytes, int] = {}  # hash -> ticket not answered yet
        self.pinned: set[bytes] = set()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.cached: dict[str, int] = {}

    def add(self, request: EngineCoreRequest) -> None:
        self.outputs[request.request_id] = []
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.abort([request_id])
        self.finished.setdefault(request_id, FinishReason.ABORT)

    def _exchange_pixel_messages(self) -> None:
        requests, releases = self.scheduler.take_pixel_messages()
        for mm_hash in releases:
            self.pinned.discard(mm_hash)
            self.asked.pop(mm_hash, None)
        for request in requests:
            self.asked[request.mm_hash] = request.ticket

    def answer_pixels(self, mm_hash: bytes | None = None) -> bool:
        """Answer one open pixel request, if the slab has room."""
        if not self.asked or len(self.pinned) >= self.slots:
            return False
        waiting_in_order = list(self.asked)
        chosen = mm_hash or (waiting_in_order[0] if self.slots < 1_000_000 else self.rng.choice(waiting_in_order))
        ticket = self.asked.pop(chosen)
        if chosen in self.poison:
            self.scheduler.pixels_failed(FeatureFailed(chosen, ticket, "the picture cannot be decoded", "invalid_image"))
        else:
            self.pinned.add(chosen)
            self.scheduler.pixels_ready(FeatureReady(chosen, ticket, 0, 1))
        return True

    def press(self) -> bool:
        """Tell the core that the slab is short, if a picture waits for room in it."""
        if not self.asked or len(self.pinned) < self.slots:
            return False
        pinned = len(self.pinned)
        self.scheduler.slab_short()
        self._exchange_pixel_messages()
        return len(self.pinned) < pinned

    def launch(self) -> SchedulerOutput | None:
        if len(self.in_flight) >= self.depth:
            return None
        step = self.scheduler.schedule()
        self._exchange_pixel_messages()
        if step is not None:
            assert 0 <= step.total_num_scheduled_tokens <= self.scheduler.max_num_batched_tokens
            assert len(step.num_scheduled_tokens) <= self.scheduler.max_num_seqs
            assert sum(item.num_tokens for item in step.encoder_inputs) <= self.scheduler.max_num_encoder_tokens
            for item in step.encoder_inputs:
                assert item.mm_hash in self.pinned, "encodes from a slot that is not pinned"
            self.in_flight.append((step, self.worker.execute(step).wait()))
        return step

    def settle(self) -> bool:
        if not self.in_flight:
            return False
        for output in self.scheduler.update(*self.in_flight.popleft()):
            self._take(output)
        return True

    def _take(self, output) -> None:  # type: ignore[no-untyped-def]
        self.outputs[output.request_id] += output.new_token_ids
        self.cached[output.request_id] = max(self.cached.get(output.request_id, 0), output.num_cached_tokens)
        if output.finish_reason is not None:
            assert output.request_id not in self.finished, "ended twice"
            self.finished[output.request_id] = output.finish_reason

    def turn(self) -> bool:
        """One random thing happens. False if nothing could."""
        actions = [self.launch, self.settle, self.answer_pixels, self.press]
        self.rng.shuffle(actions)
        asked_before = dict(self.asked), set(self.pinned)
        happened = any(action() for action in actions) or (self.asked, self.pinned) != asked_before
        for output in self.scheduler.take_failed():
            self._take(output)
        self._exchange_pixel_messages()
        self.scheduler.check_integrity()
        return happened

    def drain(self, max_turns: int = 20_000) -> None:
        """Until every request has ended. Fails if nothing can happen although something should."""
        for _ in range(max_turns):
            happened = self.turn()
            if not self.scheduler.has_requests and not self.in_flight:
                break
            assert happened, "stuck: requests wait for something that will never happen"
        else:
            raise AssertionError("livelock: too many turns")
        self._exchange_pixel_messages()
        self.scheduler.check_integrity()
        assert not self.pinned, "a slot stays pinned although every request has ended"
