"""Executors carry steps and encode batches to the workers. With one rank that is threads in the engine's process.

The contract: submitting returns at once; of each kind, futures complete in the order of submission, and a worker launches
them in that order; between the kinds there is no order. An exception in either means the device's state is unknown: it ends
the engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from mmv1.step import EncodeBatch, EncodeOutput, ModelRunnerOutput, SchedulerOutput

Work = TypeVar("Work")
Result = TypeVar("Result")
Awaited = TypeVar("Awaited", covariant=True)


class Executor(Protocol):
    def submit(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]: ...

    def submit_encode(self, batch: EncodeBatch) -> Future[EncodeOutput]: ...

    def profile(self, trace_dir: str | None) -> Future[None]: ...

    def shutdown(self) -> None: ...


class Pending(Protocol[Awaited]):
    """Something that has been launched; `wait` blocks until its result is on the host."""

    def wait(self) -> Awaited: ...


PendingOutput = Pending[ModelRunnerOutput]
PendingEncode = Pending[EncodeOutput]


class StepRunner(Protocol):
    """The part of a worker an executor needs. Each method is called on one thread, the two at the same time."""

    def execute(self, step: SchedulerOutput) -> PendingOutput: ...

    def encode(self, batch: EncodeBatch) -> PendingEncode: ...

    def profile(self, trace_dir: str | None) -> None: ...


class _Lane(Generic[Work, Result]):
    """One thread prepares and launches work, a second waits for its results, so the next piece is being launched while this
    one runs."""

    def __init__(self, launch: Callable[[Work], Pending[Result]], launching: str, waiting: str) -> None:
        self._launch = launch
        self._submitted: queue.SimpleQueue[tuple[Work, Future[Result]] | Callable[[], None] | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[Pending[Result], Future[Result]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._launch_all, name=launching, daemon=True),
            threading.Thread(target=self._complete_all, name=waiting, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work) -> Future[Result]:
        future: Future[Result] = Future()
        self._submitted.put((work, future))
        return future

    def call_between(self, action: Callable[[], None]) -> Future[None]:
        """Call `action` on the launching thread, behind what was submitted. What it raises is its caller's alone."""
        future: Future[None] = Future()

        def call() -> None:
            try:
                action()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._submitted.put(call)
        return future

    def _launch_all(self) -> None:
        while (item := self._submitted.get()) is not None:
            if callable(item):
                item()
                continue
            work, future = item
            try:
                self._launched.put((self._launch(work), future))
            except BaseException as error:
                self._launched.put((_Failed(error), future))
        self._launched.put(None)

    def _complete_all(self) -> None:
        while (item := self._launched.get()) is not None:
            pending, future = item
            try:
                future.set_result(pending.wait())
            except BaseException as error:
                future.set_exception(error)

    def close(self) -> None:
        self._submitted.put(None)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=10)


class UniProcExecutor:
    """One worker, in this process."""

    def __init__(self, worker: StepRunner) -> None:
        self._worker = worker
        self._steps = _Lane(worker.execute, "launch", "complete")
        self._encodes = _Lane(worker.encode, "encode", "encoded")

    def submit(self, step: SchedulerOutput) -> Future[ModelRunnerOutput]:
        return self._steps.submit(step)

    def submit_encode(self, batch: EncodeBatch) -> Future[EncodeOutput]:
        return self._encodes.submit(batch)

    def profile(self, trace_dir: str | None) -> Future[None]:
        """Start (or, with None, stop and write) a trace, on the thread that launches steps and between two of them."""
        return self._steps.call_between(lambda: self._worker.profile(trace_dir))

    def shutdown(self) -> None:
        """Let what was submitted finish, then stop."""
        for lane in (self._steps, self._encodes):
            lane.close()
        for lane in (self._steps, self._encodes):
            lane.join()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def wait(self) -> Any:
        raise self._error
