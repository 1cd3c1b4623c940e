"""Many independent pieces of work, a bounded number of them at once, results in the order in which they are finished.

Knows neither pictures nor files nor engines. What makes a run resumable is the caller's: `done` says which keys have results
already, and `on_result` keeps each new one (journal.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Container, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Job(Protocol):
    @property
    def key(self) -> str:
        """What it is called in every run: the same work has the same key."""


J = TypeVar("J", bound=Job)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(slots=True)
class Summary:
    """`num_finished`: jobs handed to on_result by this run. `num_skipped`: jobs that were done before it. `was_interrupted`: a
    signal ended the run while there was more to do."""

    num_finished: int = 0
    num_skipped: int = 0
    was_interrupted: bool = False


async def run(
    jobs: AsyncIterable[J] | Iterable[J],
    work: Callable[[J], Awaitable[R]],
    *,
    done: Container[str],
    max_inflight: int,
    on_result: Callable[[J, R], None],
) -> Summary:
    """Do `work` for every job whose key is not in `done`, at most `max_inflight` at once.

    A job is pulled when there is room for it and no sooner; one at a time, an iterable's in a thread, so pulling should be cheap
    beside `work`. `on_result` is called on the event loop, once a job, as soon as its result is there.

    SIGINT or SIGTERM: no further job is pulled, those begun are finished, and stderr is told so; the second time they are
    cancelled, and this task with them (CancelledError). The first exception out of `jobs`, `work` or `on_result` cancels the rest
    and is raised; what on_result was given before stays given. A failure that is a job's own fault should therefore be a result.
    """
    summary = Summary()
    turn = asyncio.Lock()
    pulling: set[asyncio.Task[None]] = set()
    stopping = is_exhausted = False

    async def take_turns() -> None:
        nonlocal is_exhausted
        this_task = _current_task()
        while not stopping:
            pulling.add(this_task)
            async with turn:
                job = await anext(pending, None)
            pulling.discard(this_task)
            if job is None:
                is_exhausted = True
                return
            on_result(job, await work(job))
            summary.num_finished += 1

    def interrupt() -> None:
        nonlocal stopping
        if stopping:
            caller.cancel()
        else:  # on a line of its own, below a progress bar's
            print("\nFinishing what is under way; a second Ctrl-C ends at once", file=sys.stderr, flush=True)
        stopping = True
        for task in pulling:
            task.cancel()

    caller = _current_task()
    on_signals(interrupt)
    try:
        async with aclosing(_not_done(jobs, done, summary)) as pending, asyncio.TaskGroup() as group:
            for _ in range(max_inflight):
                group.create_task(take_turns())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    summary.was_interrupted = stopping and not is_exhausted
    return summary


def on_signals(action: Callable[[], object]) -> None:
    """From now on SIGINT and SIGTERM call `action` on the running event loop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, action)


def _current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("not inside a task")
    return task


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """As asyncio.to_thread; but a command that was interrupted ends without the thread, which may wait for a pipe forever."""
    loop = asyncio.get_running_loop()
    returned: asyncio.Future[T] = loop.create_future()

    def give(value: T | None, error: BaseException | None) -> None:
        if returned.cancelled():
            return
        if error is not None:
            returned.set_exception(error)
        else:
            returned.set_result(value)  # type: ignore[arg-type]

    def call() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as raised:  # whatever it is, it is raised where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(give, value, error)

    threading.Thread(target=call, name="mmv1-source", daemon=True).start()
    return await returned


async def _not_done(jobs: AsyncIterable[J] | Iterable[J], done: Container[str], summary: Summary) -> AsyncGenerator[J, None]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            if job.key in done:
                summary.num_skipped += 1
            else:
                yield job
        return
    iterator = iter(jobs)

    def next_not_done() -> J | None:
        for job in iterator:
            if job.key not in done:
                return job
            summary.num_skipped += 1
        return None

    while (following := await in_daemon_thread(next_not_done)) is not None:
        yield following
