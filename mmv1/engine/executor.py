"""Executors carry steps to the workers. With one rank that is a thread in the engine's process.

The contract: `submit` returns at once; futures complete in the order of submission; a worker runs steps in that order. An
exception in a step means the device's state is unknown: it ends the engine.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Any, Protocol

from mmv1.step import ModelRunnerOutput, SchedulerOutput


class Executor(Protocol):
    def submit(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]: ...

    def shutdown(self) -> None: ...


class PendingOutput(Protocol):
    """A step that has been launched; `wait` blocks until its sampled ids are on the host."""

    def wait(self) -> ModelRunnerOutput: ...


class StepRunner(Protocol):
    """The part of a worker an executor needs."""

    def execute(self, step: SchedulerOutput) -> PendingOutput: ...


class UniProcExecutor:
    """One worker, in this process: one thread prepares and launches steps, a second waits for their results, so the next
    step is being launched while this one's ids are on their way to the host."""

    def __init__(self, worker: StepRunner) -> None:
        self._worker = worker
        self._steps: queue.SimpleQueue[tuple[SchedulerOutput, Future[ModelRunnerOutput]] | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[PendingOutput, Future[ModelRunnerOutput]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._launch, name="launch", daemon=True),
            threading.Thread(target=self._complete, name="complete", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        future: Future[ModelRunnerOutput] = Future()
        self._steps.put((step, future))
        return future

    def _launch(self) -> None:
        while (item := self._steps.get()) is not None:
            step, future = item
            try:
                self._launched.put((self._worker.execute(step), future))
            except BaseException as error:
                self._launched.put((_Failed(error), future))
        self._launched.put(None)

    def _complete(self) -> None:
        while (item := self._launched.get()) is not None:
            pending, future = item
            try:
                future.set_result(pending.wait())
            except BaseException as error:
                future.set_exception(error)

    def shutdown(self) -> None:
        """Let the steps that were submitted finish, then stop."""
        self._steps.put(None)
        for thread in self._threads:
            thread.join(timeout=10)


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def wait(self) -> Any:
        raise self._error
