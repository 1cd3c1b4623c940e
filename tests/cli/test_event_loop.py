"""A command's work ends in order when it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from mmv1.cli.event_loop import run_until_signal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_work_and_is_the_exit_status(number: int, status: int) -> None:
    closed = []

    async def work() -> int:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(60)
            return 0
        finally:
            await asyncio.sleep(0)  # closing may take a while
            closed.append(True)

    assert run_until_signal(work()) == status
    assert closed == [True]


def test_without_a_signal_the_works_own_status_and_errors_come_through() -> None:
    async def work(outcome: int) -> int:
        if outcome < 0:
            raise LookupError
        return outcome

    assert run_until_signal(work(3)) == 3
    with pytest.raises(LookupError):
        run_until_signal(work(-1))


def test_a_cancellation_of_its_own_is_no_signal() -> None:
    async def work() -> int:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_until_signal(work())
