"""The executor's contract: at once, in order, and an error where it belongs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from mmv1.engine.executor import UniProcExecutor
from mmv1.step import CachedRequestData, EncodeBatch, EncodeOutput, ModelRunnerOutput, SchedulerOutput
from tests.simulation import Executed

DEADLINE_S = 10


def step(step_id: int) -> SchedulerOutput:
    return SchedulerOutput(
        step_id=step_id,
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        new_requests=[],
        cached_requests=CachedRequestData([], []),
        finished_request_ids=[],
    )


def result(step_id: int) -> ModelRunnerOutput:
    return ModelRunnerOutput(step_id=step_id, request_ids=[], sampled_token_ids=[])


def batch(batch_id: int) -> EncodeBatch:
    return EncodeBatch(batch_id, [], [])


class Pending:
    """Of a step or a batch: what a worker may return for either."""

    def __init__(self, output: ModelRunnerOutput | EncodeOutput, waiting: Callable[[], object] = lambda: None) -> None:
        self.output = output
        self.waiting = waiting

    def wait(self) -> Any:
        self.waiting()
        return self.output


class Worker:
    """Launches at once, in both ways."""

    def execute(self, step: SchedulerOutput) -> Any:
        return Executed(result(step.step_id))

    def encode(self, batch: EncodeBatch) -> Any:
        return Pending(EncodeOutput(batch.batch_id))


def submit(executor: UniProcExecutor, kind: str, number: int) -> Future[Any]:
    return executor.submit(step(number)) if kind == "step" else executor.submit_encode(batch(number))


def number_of(output: ModelRunnerOutput | EncodeOutput) -> int:
    return output.step_id if isinstance(output, ModelRunnerOutput) else output.batch_id


@pytest.mark.parametrize("kind", ["step", "batch"])
def test_work_runs_and_completes_in_order_and_submitting_does_not_wait(kind: str) -> None:
    gate, seen = threading.Event(), []

    class Gated(Worker):
        def execute(self, step: SchedulerOutput) -> Any:
            assert gate.wait(DEADLINE_S)
            seen.append(step.step_id)
            return super().execute(step)

        def encode(self, batch: EncodeBatch) -> Any:
            assert gate.wait(DEADLINE_S)
            seen.append(batch.batch_id)
            return super().encode(batch)

    executor = UniProcExecutor(Gated())
    done: list[int] = []
    for future in [submit(executor, kind, i) for i in range(20)]:
        future.add_done_callback(lambda f: done.append(number_of(f.result())))
    assert not seen
    gate.set()
    executor.shutdown()
    assert seen == done == list(range(20))


@pytest.mark.parametrize("kind", ["step", "batch"])
def test_the_next_is_launched_while_the_last_ones_output_is_awaited(kind: str) -> None:
    launched, second_launched = [], threading.Event()

    def waiting() -> None:
        assert second_launched.wait(DEADLINE_S), "waiting for one output holds up the launch of the next"

    def launch(number: int, output: ModelRunnerOutput | EncodeOutput) -> Pending:
        launched.append(number)
        if len(launched) == 2:
            second_launched.set()
        return Pending(output, waiting)

    class Recording(Worker):
        def execute(self, step: SchedulerOutput) -> Any:
            return launch(step.step_id, result(step.step_id))

        def encode(self, batch: EncodeBatch) -> Any:
            return launch(batch.batch_id, EncodeOutput(batch.batch_id))

    executor = UniProcExecutor(Recording())
    futures = [submit(executor, kind, i) for i in range(2)]
    assert [number_of(future.result(DEADLINE_S)) for future in futures] == [0, 1]
    executor.shutdown()


def test_neither_kind_holds_up_the_other() -> None:
    gates = {"step": threading.Event(), "batch": threading.Event()}

    class Gated(Worker):
        def execute(self, step: SchedulerOutput) -> Any:
            assert gates["step"].wait(DEADLINE_S)
            return Pending(result(step.step_id), lambda: gates["step"].wait(DEADLINE_S))

        def encode(self, batch: EncodeBatch) -> Any:
            assert gates["batch"].wait(DEADLINE_S)
            return Pending(EncodeOutput(batch.batch_id), lambda: gates["batch"].wait(DEADLINE_S))

    for held, free in (("step", "batch"), ("batch", "step")):
        gates[held].clear()
        gates[free].set()
        executor = UniProcExecutor(Gated())
        waits = submit(executor, held, 1)
        for i in range(3):
            submit(executor, free, i).result(DEADLINE_S)
        assert not waits.done()
        gates[held].set()
        executor.shutdown()
        assert waits.done()


@pytest.mark.parametrize("kind", ["step", "batch"])
@pytest.mark.parametrize("where", ["launch", "wait"])
def test_an_error_is_the_futures(kind: str, where: str) -> None:
    def lose() -> None:
        raise RuntimeError("lost")

    class Broken(Worker):
        def execute(self, step: SchedulerOutput) -> Any:
            if where == "launch":
                lose()
            return Pending(result(step.step_id), lose)

        def encode(self, batch: EncodeBatch) -> Any:
            if where == "launch":
                lose()
            return Pending(EncodeOutput(batch.batch_id), lose)

    executor = UniProcExecutor(Broken())
    with pytest.raises(RuntimeError, match="lost"):
        submit(executor, kind, 1).result(DEADLINE_S)
    executor.shutdown()


def test_shutting_down_ends_all_threads() -> None:
    before = set(threading.enumerate())
    executor = UniProcExecutor(Worker())
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert {thread.name for thread in started} == {"launch", "complete", "encode", "encoded"}
    executor.shutdown()
    assert not any(thread.is_alive() for thread in started)


def test_a_profile_starts_and_stops_between_steps_on_the_thread_that_launches_them() -> None:
    log: list[tuple[object, str]] = []

    class Profiled(Worker):
        def execute(self, step: SchedulerOutput) -> Any:
            log.append((step.step_id, threading.current_thread().name))
            return super().execute(step)

        def profile(self, trace_dir: str | None) -> None:
            log.append((trace_dir, threading.current_thread().name))
            if trace_dir is None:
                raise ValueError("no profile is being recorded")

    executor = UniProcExecutor(Profiled())
    futures = [executor.submit(step(1)), executor.profile("there"), executor.submit(step(2)), executor.profile(None)]
    with pytest.raises(ValueError, match="no profile"):
        futures[3].result(DEADLINE_S)
    assert executor.submit(step(3)).result(DEADLINE_S).step_id == 3  # that was the profile's failure alone
    assert log == [(name, "launch") for name in (1, "there", 2, None, 3)]
    executor.shutdown()
