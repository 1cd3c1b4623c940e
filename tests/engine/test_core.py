"""EngineCore with a simulated worker behind the real executor: the loop, without torch, sockets or processes."""

from __future__ import annotations

import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.engine.core import EngineCore
from mmv1.engine.executor import UniProcExecutor
from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.manager import KVCacheManager
from mmv1.scheduler.grammar import Grammars
from mmv1.scheduler.pixels import PixelLedger
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import EncodeBatch, ModelRunnerOutput, SchedulerOutput
from mmv1.types import (
    Abort,
    EngineCoreOutputs,
    EngineCoreRequest,
    FeatureFailed,
    FeatureReady,
    FinishReason,
    MMFeature,
    Ping,
    ProfileAnswer,
    StartProfile,
    StopProfile,
)
from tests.simulation import Encoding, Executed, SimulatedWorker, expected_output, make_prompt, make_request

DEADLINE_S = 20.0
NO_GRAMMARS = Grammars(Path("there is no model"), 50, [])


def make_scheduler(num_blocks: int = 256) -> Scheduler:
    return Scheduler(
        KVCacheManager(num_blocks, 4, BlockHasher(4)),
        EncoderCacheManager(64 * 16, bytes_per_token=1),
        PixelLedger(100_000),
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_num_encoder_tokens=64,
    )


class GatedWorker(SimulatedWorker):
    """Executes a step, and encodes a batch, only when told to."""

    def __init__(self, *, open_steps: int = 0, open_encodes: int = 0) -> None:
        super().__init__(256, 4, 64)
        self.gate = threading.Semaphore(open_steps)
        self.encode_gate = threading.Semaphore(open_encodes)

    def execute(self, step: SchedulerOutput) -> Executed:
        assert self.gate.acquire(timeout=DEADLINE_S)
        return super().execute(step)

    def encode(self, batch: EncodeBatch) -> Encoding:
        assert self.encode_gate.acquire(timeout=DEADLINE_S)
        return super().encode(batch)


class Client:
    """The API server's side: collects outputs, answers pixel requests."""

    def __init__(self, worker: SimulatedWorker, *, answer_pixels: bool = True) -> None:
        self.worker = worker
        self.news: queue.SimpleQueue[EngineCoreOutputs] = queue.SimpleQueue()
        self.core = EngineCore(make_scheduler(), UniProcExecutor(worker), self._take, grammars=NO_GRAMMARS)
        self.answer_pixels = answer_pixels
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.pinned: set[bytes] = set()
        self.thread = threading.Thread(target=self.core.run, daemon=True)
        self.thread.start()

    def _take(self, news: EngineCoreOutputs) -> None:
        for mm_hash in news.pixel_releases:
            self.pinned.discard(mm_hash)
        for request in news.pixel_requests:
            if self.answer_pixels:
                self.pinned.add(request.mm_hash)
                self.core.post(FeatureReady(request.mm_hash, request.ticket, 0, 1))
        for output in news.outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.finish_reason
        self.news.put(news)

    def wait_until(self, condition) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, "the deadline passed"
            try:
                self.news.get(timeout=min(left, 0.05))
            except queue.Empty:
                pass

    def stop(self) -> None:
        self.core.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(SimulatedWorker(256, 4, 64))
    yield client
    client.stop()


def test_many_requests_get_their_own_answers(client: Client) -> None:
    rng = random.Random(1)
    pictures = [(bytes([i]) * 32, 3 + i) for i in range(5)]
    requests = [
        make_request(f"r{i}", *make_prompt(rng, rng.choices(pictures, k=rng.randrange(3))), max_tokens=12) for i in range(40)
    ]
    for request in requests:
        client.core.post(request)
    client.wait_until(lambda: len(client.finished) == len(requests))
    for request in requests:
        assert client.tokens[request.request_id] == expected_output(request)
    client.stop()
    client.core.scheduler.check_integrity()
    assert not client.pinned


def test_the_next_step_is_submitted_while_one_runs() -> None:
    worker = GatedWorker()
    client = Client(worker)
    submitted: list[int] = []
    submit = client.core._executor.submit

    def record(step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        submitted.append(step.step_id)
        return submit(step)

    client.core._executor.submit = record  # type: ignore[method-assign]
    client.core.post(make_request("r", [1, 2, 3], eos=(), max_tokens=6))
    client.wait_until(lambda: len(submitted) == 2)
    assert not worker.steps  # neither has run, and the second needs a token that the first will sample
    worker.gate.release(100)
    client.wait_until(lambda: "r" in client.finished)
    assert client.tokens["r"] == expected_output(make_request("r", [1, 2, 3], eos=(), max_tokens=6))
    client.stop()


def test_an_idle_core_does_not_spin(client: Client) -> None:
    client.core.post(make_request("r", [1, 2, 3], eos=(), max_tokens=3))
    client.wait_until(lambda: "r" in client.finished)
    turns = 0
    run_once = client.core.run_once

    def count() -> None:
        nonlocal turns
        turns += 1
        run_once()

    client.core.run_once = count  # type: ignore[method-assign]
    for ping_id in range(5):
        client.core.post(Ping(ping_id))
    pongs: list[int] = []

    def all_answered() -> bool:
        while not client.news.empty():
            if (news := client.news.get()).pong is not None:
                pongs.append(news.pong.ping_id)
        return bool(pongs) and pongs[-1] == 4

    deadline = time.monotonic() + DEADLINE_S
    while not all_answered():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert turns <= 7  # one for each event at most, and the one that waits


def picture_request(name: str, mm_hash: bytes, *, max_tokens: int = 3) -> EngineCoreRequest:
    return make_request(name, [50] * 8 + [1], [MMFeature(mm_hash, 0, 8, (1, 2, 16))], max_tokens=max_tokens, eos=())


def test_decoding_goes_on_while_pictures_are_encoded_and_their_end_wakes_the_loop() -> None:
    worker = GatedWorker(open_steps=1000)
    client = Client(worker)
    text = make_request("text", [1, 2, 3], eos=(), max_tokens=60)
    pictures = [picture_request(f"r{i}", bytes([i]) * 32) for i in range(3)]
    client.core.post(pictures[0])
    client.wait_until(lambda: client.core._encodes_in_flight)
    client.core.post(text)
    client.wait_until(lambda: "text" in client.finished)
    assert client.tokens["text"] == expected_output(text) and "r0" not in client.tokens
    for request in pictures[1:]:
        client.core.post(request)
    client.wait_until(lambda: client.core.scheduler.encoding.num_in_flight == 2)  # the third waits: two at a time
    assert not worker.batches
    worker.encode_gate.release(10)
    client.wait_until(lambda: len(client.finished) == 4)  # nothing but the end of a batch wakes it
    for request in pictures:
        assert client.tokens[request.request_id] == expected_output(request)
    client.stop()
    client.core.scheduler.check_integrity()
    assert client.core.scheduler.stats.encode_seconds == 0.25 * len(worker.batches)
    assert not client.pinned


def test_encode_batches_go_before_a_step_and_are_looked_for_again_behind_it() -> None:
    core = EngineCore(make_scheduler(), UniProcExecutor(SimulatedWorker(256, 4, 64)), lambda news: None, grammars=NO_GRAMMARS)
    asked: list[str] = []
    core.scheduler.schedule = lambda: asked.append("step")  # type: ignore[method-assign, assignment, func-returns-value, return-value]
    core.scheduler.schedule_encode = lambda: asked.append("encode")  # type: ignore[method-assign, assignment, func-returns-value, return-value]
    core.post(Ping(1))
    core.run_once()
    assert asked == ["encode", "step", "encode"]


def test_stopping_waits_for_a_batch_in_flight() -> None:
    worker = GatedWorker(open_steps=1000)
    client = Client(worker)
    client.core.post(picture_request("r", b"c" * 32))
    client.wait_until(lambda: client.core._encodes_in_flight)
    client.core.stop()
    client.core.post(Ping(1))
    client.wait_until(lambda: not client.core.scheduler.has_requests)
    client.thread.join(0.2)
    assert client.thread.is_alive()
    worker.encode_gate.release(1)
    client.thread.join(DEADLINE_S)
    assert not client.thread.is_alive() and len(worker.batches) == 1
    client.core.scheduler.check_integrity()
    assert not client.pinned


def test_a_batch_that_ends_is_progress() -> None:
    worker = GatedWorker(open_steps=1000)
    client = Client(worker)
    ages: list[float] = []
    publish = client.core._publish
    client.core._publish = lambda news: (ages.append(news.pong.stalled_s) if news.pong else None, publish(news))  # type: ignore[method-assign, func-returns-value]
    client.core.post(picture_request("first", b"c" * 32))
    client.wait_until(lambda: client.core._encodes_in_flight)
    client.answer_pixels = False
    client.core.post(make_request("second", [50] * 8 + [1], [MMFeature(b"d" * 32, 0, 8, (1, 2, 16))]))
    client.core.post(Ping(1))
    client.wait_until(lambda: len(ages) == 1)
    client.core.post(Abort(["first"]))  # no step will run
    started = time.monotonic()
    client.wait_until(lambda: time.monotonic() - started > 0.3)
    released = time.monotonic()
    worker.encode_gate.release(1)
    client.wait_until(lambda: not client.core._encodes_in_flight)
    client.core.post(Ping(2))
    client.wait_until(lambda: len(ages) == 2)
    assert ages[1] <= time.monotonic() - released and not worker.steps
    client.stop()


@pytest.mark.parametrize("where", ["encode", "wait"])
def test_a_batch_that_fails_ends_the_loop_with_its_error(where: str) -> None:
    class Lost(Encoding):
        def wait(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("the device is lost")

    class Broken(SimulatedWorker):
        def encode(self, batch: EncodeBatch) -> Encoding:
            if where == "encode":
                raise RuntimeError("the device is lost")
            return Lost(self, batch)

    core: EngineCore

    def answer(news: EngineCoreOutputs) -> None:
        for request in news.pixel_requests:
            core.post(FeatureReady(request.mm_hash, request.ticket, 0, 1))

    core = EngineCore(make_scheduler(), UniProcExecutor(Broken(256, 4, 64)), answer, grammars=NO_GRAMMARS)
    core.post(picture_request("r", b"c" * 32))
    with pytest.raises(RuntimeError, match="the device is lost"):
        core.run()


def test_aborting_while_a_picture_is_encoded_leaves_nothing_behind() -> None:
    worker = GatedWorker(open_steps=1000)
    client = Client(worker)
    client.core.post(picture_request("r", b"c" * 32))
    client.wait_until(lambda: client.core._encodes_in_flight)
    client.core.post(Abort(["r"]))
    client.wait_until(lambda: not client.core.scheduler.has_requests)
    worker.encode_gate.release(1)
    client.wait_until(lambda: not client.pinned)  # told, although no request lives
    client.stop()
    client.core.scheduler.check_integrity()


def test_a_core_that_waits_for_pixels_waits_and_wakes() -> None:
    client = Client(SimulatedWorker(256, 4, 64), answer_pixels=False)
    cat = MMFeature(b"c" * 32, 0, 8, (1, 2, 16))
    request = make_request("r", [50] * 8 + [1], [cat], max_tokens=3)
    client.core.post(request)
    client.wait_until(lambda: client.core.scheduler.pixels.num_requests == 1)
    client.core.post(FeatureReady(cat.mm_hash, 1, 0, 1))
    client.wait_until(lambda: "r" in client.finished)
    assert client.tokens["r"] == expected_output(request)
    client.stop()


def test_a_failed_picture_ends_its_request_with_the_reason(client: Client) -> None:
    client.answer_pixels = False
    outputs = []
    take = client.core._publish
    client.core._publish = lambda news: (outputs.extend(news.outputs), take(news))  # type: ignore[method-assign, func-returns-value]
    client.core.post(make_request("r", [50] * 8 + [1], [MMFeature(b"c" * 32, 0, 8, (1, 2, 16))]))
    client.wait_until(lambda: client.core.scheduler.pixels.num_requests == 1)
    client.core.post(FeatureFailed(b"c" * 32, 1, "the picture is damaged", "invalid_image"))
    client.wait_until(lambda: "r" in client.finished)
    assert (outputs[-1].finish_reason, outputs[-1].error, outputs[-1].error_code) == (
        FinishReason.ERROR,
        "the picture is damaged",
        "invalid_image",
    )


def test_late_duplicate_and_unknown_messages_are_ignored(client: Client) -> None:
    client.core.post(Abort(["nobody"]))
    client.core.post(FeatureReady(b"x" * 32, 3, 0, 1))
    client.core.post(FeatureFailed(b"x" * 32, 3, "damaged", "invalid_image"))
    request = make_request("r", [1, 2, 3], max_tokens=4)
    client.core.post(request)
    client.wait_until(lambda: "r" in client.finished)
    client.core.post(Abort(["r", "r"]))
    client.core.post(make_request("s", [1, 2, 3], max_tokens=4))
    client.wait_until(lambda: "s" in client.finished)
    assert client.tokens["r"] == client.tokens["s"] == expected_output(request)


def test_aborting_in_flight_frees_everything() -> None:
    worker = GatedWorker()
    client = Client(worker)
    client.core.post(make_request("r", [1, 2, 3], eos=(), max_tokens=100))
    worker.gate.release(3)
    client.wait_until(lambda: len(client.tokens.get("r", [])) == 3)
    client.core.post(Abort(["r"]))
    client.core.post(Ping(1))
    client.wait_until(lambda: not client.core.scheduler.has_requests)
    assert client.core.scheduler.kv.num_used_blocks == 0
    worker.gate.release(10)
    client.stop()
    assert "r" not in client.finished


def test_the_age_of_a_hanging_step_is_told() -> None:
    worker = GatedWorker()
    client = Client(worker)
    client.core.post(make_request("r", [1, 2, 3], eos=(), max_tokens=2))
    client.wait_until(lambda: client.core._in_flight)
    ages: list[float] = []
    publish = client.core._publish
    client.core._publish = lambda news: (ages.append(news.pong.stalled_s) if news.pong else None, publish(news))  # type: ignore[method-assign, func-returns-value]
    for ping_id in (1, 2):
        client.core.post(Ping(ping_id))
        client.wait_until(lambda count=ping_id: len(ages) == count)
    assert 0 < ages[0] < ages[1]
    worker.gate.release(10)
    client.wait_until(lambda: "r" in client.finished)
    client.stop()


def test_a_step_that_fails_ends_the_loop_with_its_error() -> None:
    class Broken(SimulatedWorker):
        def execute(self, step: SchedulerOutput) -> Executed:
            raise RuntimeError("the device is lost")

    core = EngineCore(make_scheduler(), UniProcExecutor(Broken(256, 4, 64)), lambda news: None, grammars=NO_GRAMMARS)
    core.post(make_request("r", [1, 2, 3]))
    with pytest.raises(RuntimeError, match="the device is lost"):
        core.run()


def test_none_of_it_imports_torch() -> None:
    program = (
        "import sys; sys.path.insert(0, '.'); import tests.engine.test_core, tests.scheduler.harness, mmv1.engine.core_process;"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_core_that_can_no_longer_be_reached_ends() -> None:
    core = EngineCore(make_scheduler(), UniProcExecutor(SimulatedWorker(256, 4, 64)), lambda news: None, grammars=NO_GRAMMARS)
    core.fail(ValueError("the input thread ended"))
    with pytest.raises(ValueError, match="the input thread ended"):
        core.run()


def test_requests_that_stand_still_are_told_even_when_no_step_runs() -> None:
    client = Client(SimulatedWorker(256, 4, 64), answer_pixels=False)
    stalls: list[float] = []
    publish = client.core._publish
    client.core._publish = lambda news: (stalls.append(news.pong.stalled_s) if news.pong else None, publish(news))  # type: ignore[method-assign, func-returns-value]
    client.core.post(Ping(1))
    client.wait_until(lambda: len(stalls) == 1)
    client.core.post(make_request("r", [50] * 8 + [1], [MMFeature(b"c" * 32, 0, 8, (1, 2, 16))]))
    client.wait_until(lambda: client.core.scheduler.pixels.num_requests == 1)
    for ping_id in (2, 3):
        client.core.post(Ping(ping_id))
        client.wait_until(lambda count=ping_id: len(stalls) == count)
    assert stalls[0] == 0 and 0 < stalls[1] < stalls[2]
    client.stop()


def test_a_profile_is_answered_when_it_has_started_and_when_it_is_written() -> None:
    class Profiled(SimulatedWorker):
        is_on = False

        def profile(self, trace_dir: str | None) -> None:
            if self.is_on is (trace_dir is not None):
                raise ValueError("it is so already")
            self.is_on = trace_dir is not None

    answers: list[ProfileAnswer] = []

    class Watching(Client):
        def _take(self, news: EngineCoreOutputs) -> None:
            answers.extend(news.profile_answers)
            super()._take(news)

    client = Watching(Profiled(256, 4, 64))
    for message in (StartProfile(1, "there"), StopProfile(2), StopProfile(3)):
        client.core.post(message)
        client.wait_until(lambda number=message.call_id: len(answers) == number)
    assert answers == [ProfileAnswer(1), ProfileAnswer(2), ProfileAnswer(3, "it is so already")]
    client.core.stop()
    client.thread.join(DEADLINE_S)
    assert not client.thread.is_alive()
