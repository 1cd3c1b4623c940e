"""The runner with work that the test itself finishes: bounds, order, failures, signals."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mmv1.batch.runner import Summary, run

DEADLINE_S = 20


@dataclass(frozen=True)
class Job:
    key: str


class Work:
    """Begun jobs wait until the test ends them: `finish(key)`, or `fail(key, error)`."""

    def __init__(self) -> None:
        self.begun: dict[str, asyncio.Future[str]] = {}
        self.results: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        self.pulled: list[str] = []
        self.most_open = 0

    def jobs(self, keys: range | list[int]) -> Iterator[Job]:
        for key in keys:
            self.pulled.append(str(key))
            yield Job(str(key))

    async def __call__(self, job: Job) -> str:
        future = self.begun[job.key] = asyncio.get_running_loop().create_future()
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled.append(job.key)
            raise

    @property
    def num_open(self) -> int:
        return sum(not future.done() for future in self.begun.values())

    def keep(self, job: Job, result: str) -> None:
        self.results.append((job.key, result))

    def finish(self, key: int) -> None:
        self.begun[str(key)].set_result(f"result {key}")

    def fail(self, key: int, error: Exception) -> None:
        self.begun[str(key)].set_exception(error)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S / 2):
        while not condition():
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Time for what must not happen to happen."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def start(work: Work, jobs: Any, *, max_inflight: int, done: Any = ()) -> asyncio.Task[Summary]:
    return asyncio.ensure_future(run(jobs, work, done=done, max_inflight=max_inflight, on_result=work.keep))


def in_loop(test: Callable[[Work], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run_it() -> None:
        asyncio.run(asyncio.wait_for(test(Work()), DEADLINE_S))

    run_it.__name__ = test.__name__
    return run_it


@in_loop
async def test_jobs_are_pulled_only_as_there_is_room(work: Work) -> None:
    running = start(work, work.jobs(range(10)), max_inflight=3)
    await until(lambda: work.num_open == 3)
    await settle()
    assert work.pulled == ["0", "1", "2"]
    work.finish(1)
    await until(lambda: "3" in work.begun)
    await settle()
    assert work.pulled == ["0", "1", "2", "3"] and work.results == [("1", "result 1")]
    while not running.done():
        for key in [key for key, future in work.begun.items() if not future.done()]:
            work.finish(int(key))
        await asyncio.sleep(0)
    assert sorted(work.begun) == [str(key) for key in range(10)] and work.most_open == 3
    assert running.result() == Summary(num_finished=10)


@in_loop
async def test_results_come_in_the_order_in_which_they_are_finished(work: Work) -> None:
    running = start(work, work.jobs(range(50)), max_inflight=50)
    await until(lambda: len(work.begun) == 50)
    order = random.Random(1).sample(range(50), 50)
    for key in order:
        work.finish(key)
        await until(lambda key=key: work.results[-1:] == [(str(key), f"result {key}")])
    assert await running == Summary(num_finished=50)
    assert [int(key) for key, _ in work.results] == order


@in_loop
async def test_what_is_done_is_not_done_again(work: Work) -> None:
    running = start(work, work.jobs(range(6)), max_inflight=4, done={"0", "2", "5"})
    await until(lambda: len(work.begun) == 3)
    for key in (1, 3, 4):
        work.finish(key)
    assert await running == Summary(num_finished=3, num_skipped=3)
    assert [key for key, _ in work.results] == ["1", "3", "4"]


@in_loop
async def test_an_iterable_that_blocks_does_not_block_the_loop(work: Work) -> None:
    gate = threading.Event()

    def jobs() -> Iterator[Job]:
        yield Job("0")
        gate.wait(DEADLINE_S)
        yield Job("1")

    running = start(work, jobs(), max_inflight=2)
    await until(lambda: "0" in work.begun)
    work.finish(0)
    await until(lambda: len(work.results) == 1)
    gate.set()
    await until(lambda: "1" in work.begun)
    work.finish(1)
    assert (await running).num_finished == 2


@in_loop
async def test_an_async_iterable_is_taken_too(work: Work) -> None:
    async def jobs() -> AsyncIterator[Job]:
        for key in range(4):
            await asyncio.sleep(0)
            yield Job(str(key))

    running = start(work, jobs(), max_inflight=9, done={"3"})
    await until(lambda: len(work.begun) == 3)
    for key in range(3):
        work.finish(key)
    assert await running == Summary(num_finished=3, num_skipped=1)


@in_loop
async def test_work_that_fails_ends_the_run_and_keeps_what_is_finished(work: Work) -> None:
    running = start(work, work.jobs(range(100)), max_inflight=4)
    await until(lambda: work.num_open == 4)
    work.finish(2)
    await until(lambda: work.num_open == 4)
    work.fail(0, KeyError("unforeseen"))
    with pytest.raises(KeyError, match="unforeseen"):
        await running
    assert work.results == [("2", "result 2")]
    assert sorted(work.cancelled) == ["1", "3", "4"] and len(work.pulled) == 5


@in_loop
async def test_a_failure_where_jobs_come_from_or_results_go_ends_the_run(work: Work) -> None:
    def broken() -> Iterator[Job]:
        yield Job("0")
        raise OSError("the folder is gone")

    running = start(work, broken(), max_inflight=3)
    with pytest.raises(OSError, match="the folder is gone"):
        await running

    def full(job: Job, result: str) -> None:
        raise OSError("the disk is full")

    more = Work()
    writing = asyncio.ensure_future(run(more.jobs(range(9)), more, done=(), max_inflight=2, on_result=full))
    await until(lambda: more.num_open == 2)
    more.finish(0)
    with pytest.raises(OSError, match="the disk is full"):
        await writing
    assert more.cancelled == ["1"] and len(more.pulled) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_begun_finish(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    @in_loop
    async def test(work: Work) -> None:
        running = start(work, work.jobs(range(100)), max_inflight=3)
        await until(lambda: work.num_open == 3)
        os.kill(os.getpid(), number)
        await settle()
        for key in (2, 0, 1):
            assert not running.done()
            work.finish(key)
            await settle()
        assert await running == Summary(num_finished=3, was_interrupted=True)
        assert len(work.pulled) == 3 and not work.cancelled

    test()
    assert capsys.readouterr().err == "\nFinishing what is under way; a second Ctrl-C ends at once\n"


@in_loop
async def test_a_second_signal_ends_it_at_once(work: Work) -> None:
    running = start(work, work.jobs(range(100)), max_inflight=3)
    await until(lambda: work.num_open == 3)
    work.finish(1)
    await until(lambda: work.num_open == 3)
    os.kill(os.getpid(), signal.SIGINT)
    await settle()
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(running.done)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert work.results == [("1", "result 1")] and sorted(work.cancelled) == ["0", "2", "3"]


@in_loop
async def test_a_signal_does_not_wait_for_the_next_job(work: Work) -> None:
    async def jobs() -> AsyncIterator[Job]:
        yield Job("0")
        await asyncio.Event().wait()

    running = start(work, jobs(), max_inflight=5)
    await until(lambda: work.num_open == 1)
    os.kill(os.getpid(), signal.SIGINT)
    await settle()
    work.finish(0)
    assert await running == Summary(num_finished=1, was_interrupted=True)


@in_loop
async def test_a_signal_after_the_last_job_was_pulled_interrupts_nothing(work: Work) -> None:
    running = start(work, work.jobs(range(2)), max_inflight=5)
    await until(lambda: work.num_open == 2)
    await settle()
    os.kill(os.getpid(), signal.SIGINT)
    await settle()
    work.finish(0)
    work.finish(1)
    assert await running == Summary(num_finished=2)


def test_any_order_of_finishing_gives_every_result_once() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        num_jobs, max_inflight = chance.randrange(40), chance.randrange(1, 8)
        done = {str(key) for key in range(num_jobs) if chance.random() < 0.3}

        @in_loop
        async def test(work: Work, chance=chance, num_jobs=num_jobs, max_inflight=max_inflight, done=done) -> None:
            running = start(work, work.jobs(range(num_jobs)), max_inflight=max_inflight, done=done)
            while not running.done():
                if waiting := [key for key, future in work.begun.items() if not future.done()]:
                    work.finish(int(chance.choice(waiting)))
                await asyncio.sleep(0)
            expected = {str(key) for key in range(num_jobs)} - done
            assert {key for key, _ in work.results} == expected and len(work.results) == len(expected)
            assert running.result() == Summary(len(expected), len(done)) and work.most_open <= max_inflight

        test()
