"""Drives a Scheduler against the simulated worker, with pixels, encode batches and steps that take a while, for property tests.

Steps are submitted, executed and applied at times of their own, in order; so are encode batches (launched, done and applied at
once). Anything may happen in between.
"""

from __future__ import annotations

import random
from collections import deque

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.manager import KVCacheManager
from mmv1.scheduler.pixels import PixelLedger
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import ENCODER_CACHE_PAGE_ROWS, EncodeBatch, ModelRunnerOutput, SchedulerOutput
from mmv1.types import EngineCoreRequest, FeatureFailed, FeatureReady, FinishReason
from tests.simulation import Encoding, SimulatedWorker


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
        encode_depth: int = 2,
        max_ahead_patches: int = 100_000,
        seed: int = 0,
        poison: frozenset[bytes] = frozenset(),
        slots: int = 1_000_000,
        **switches: int,
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
            **switches,
        )
        self.depth = depth
        self.encode_depth = encode_depth
        self.poison = poison
        self.slots = slots  # pictures the slab holds at a time; further ones wait their turn, in order
        self.submitted: deque[SchedulerOutput] = deque()
        self.executed: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.submitted_encodes: deque[EncodeBatch] = deque()
        self.encoding: deque[Encoding] = deque()
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
        """Submit a step."""
        if len(self.submitted) + len(self.executed) >= self.depth:
            return None
        step = self.scheduler.schedule()
        self._exchange_pixel_messages()
        if step is not None:
            assert 0 < step.total_num_scheduled_tokens <= self.scheduler.max_num_batched_tokens
            assert len(step.num_scheduled_tokens) <= self.scheduler.max_num_seqs
            self.submitted.append(step)
        return step

    def execute(self) -> bool:
        if not self.submitted or self.submitted[0].after_batch > self.worker.last_batch_id:
            return False  # one that follows a batch waits until that is launched
        step = self.submitted.popleft()
        self.executed.append((step, self.worker.execute(step).wait()))
        return True

    def settle(self) -> bool:
        """Apply the oldest step, executing it if that has not happened yet."""
        if not self.executed and not self.execute():
            return False
        for output in self.scheduler.update(*self.executed.popleft()):
            self._take(output)
        return True

    def launch_encode(self) -> EncodeBatch | None:
        """Submit an encode batch."""
        if len(self.submitted_encodes) + len(self.encoding) >= self.encode_depth:
            return None
        batch = self.scheduler.schedule_encode()
        self._exchange_pixel_messages()
        if batch is not None:
            num_tokens = sum(item.num_tokens for item in batch.inputs)
            assert num_tokens <= self.scheduler.encoding.max_num_tokens or len(batch.inputs) == 1
            for item in batch.inputs:
                assert item.mm_hash in self.pinned, "encodes from a slot that is not pinned"
            self.submitted_encodes.append(batch)
        return batch

    def start_encode(self) -> bool:
        if not self.submitted_encodes:
            return False
        self.encoding.append(self.worker.encode(self.submitted_encodes.popleft()))
        return True

    def settle_encode(self) -> bool:
        """Finish and apply the oldest encode batch, starting it if that has not happened yet."""
        if not self.encoding and not self.start_encode():
            return False
        encoding = self.encoding.popleft()
        for item in encoding.batch.inputs:
            assert item.mm_hash in self.pinned, "the slot was given up while it was read"
        encoding.wait()
        self.scheduler.update_encode(encoding.batch)
        return True

    def encode(self) -> EncodeBatch | None:
        """Submit an encode batch and see it done."""
        batch = self.launch_encode()
        if batch is not None:
            while self.settle_encode():
                pass
            self._exchange_pixel_messages()
        return batch

    @property
    def is_busy(self) -> bool:
        return bool(self.submitted or self.executed or self.submitted_encodes or self.encoding)

    def _take(self, output) -> None:  # type: ignore[no-untyped-def]
        self.outputs[output.request_id] += output.new_token_ids
        self.cached[output.request_id] = max(self.cached.get(output.request_id, 0), output.num_cached_tokens)
        if output.finish_reason is not None:
            assert output.request_id not in self.finished, "ended twice"
            self.finished[output.request_id] = output.finish_reason

    def turn(self) -> bool:
        """One random thing happens. False if nothing could."""
        actions = [
            self.launch, self.execute, self.settle, self.launch_encode, self.start_encode, self.settle_encode,
            self.answer_pixels, self.press,
        ]  # fmt: skip
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
            if not self.scheduler.has_requests and not self.is_busy:
                break
            assert happened, "stuck: requests wait for something that will never happen"
        else:
            raise AssertionError("livelock: too many turns")
        self._exchange_pixel_messages()
        self.scheduler.check_integrity()
        assert not self.pinned, "a slot stays pinned although every request has ended"
