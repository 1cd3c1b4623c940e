"""The executor's contract: at once, in order, and an error where it belongs."""

from __future__ import annotations

import threading

import pytest

from mmv1.engine.executor import UniProcExecutor
from mmv1.step import CachedRequestData, ModelRunnerOutput, SchedulerOutput
from tests.simulation import Executed


def step(step_id: int) -> SchedulerOutput:
    return SchedulerOutput(
        step_id=step_id,
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        new_requests=[],
        cached_requests=CachedRequestData([], []),
        encoder_inputs=[],
        free_mm_hashes=[],
        finished_request_ids=[],
    )


def result(step_id: int) -> ModelRunnerOutput:
    return ModelRunnerOutput(step_id=step_id, request_ids=[], sampled_token_ids=[])


def test_steps_run_and_complete_in_order_and_submitting_does_not_wait() -> None:
    gate, seen = threading.Event(), []

    class Worker:
        def execute(self, step: SchedulerOutput) -> Executed:
            assert gate.wait(10)
            seen.append(step.step_id)
            return Executed(result(step.step_id))

    executor = UniProcExecutor(Worker())
    done: list[int] = []
    futures = [executor.submit(step(i)) for i in range(20)]
    for future in futures:
        future.add_done_callback(lambda f: done.append(f.result().step_id))
    assert not seen
    gate.set()
    executor.shutdown()
    assert seen == done == list(range(20))


def test_the_next_step_is_launched_while_the_last_ones_output_is_awaited() -> None:
    launched, second_launched = [], threading.Event()

    class Pending:
        def __init__(self, step_id: int) -> None:
            self.step_id = step_id

        def wait(self) -> ModelRunnerOutput:
            assert second_launched.wait(10), "waiting for one step's output holds up the launch of the next"
            return result(self.step_id)

    class Worker:
        def execute(self, step: SchedulerOutput) -> Pending:
            launched.append(step.step_id)
            if len(launched) == 2:
                second_launched.set()
            return Pending(step.step_id)

    executor = UniProcExecutor(Worker())
    futures = [executor.submit(step(i)) for i in range(2)]
    assert [future.result(10).step_id for future in futures] == [0, 1]
    executor.shutdown()


@pytest.mark.parametrize("where", ["execute", "wait"])
def test_an_error_is_the_futures(where: str) -> None:
    class Pending:
        def wait(self) -> ModelRunnerOutput:
            raise RuntimeError("lost")

    class Worker:
        def execute(self, step: SchedulerOutput) -> Pending:
            if where == "execute":
                raise RuntimeError("lost")
            return Pending()

    executor = UniProcExecutor(Worker())
    with pytest.raises(RuntimeError, match="lost"):
        executor.submit(step(1)).result(10)
    executor.shutdown()
