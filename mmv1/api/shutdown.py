"""How the server ends: what is being answered is finished, within a time; the rest ends with an error that says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from mmv1.api.admission import Admission
from mmv1.log import logger

_LAST_WORDS_S = 2.0  # for error events and error answers to reach their clients


class Shutdown:
    """`end_requests` makes every request that is being computed end with an error."""

    def __init__(self, admission: Admission, timeout_s: float, end_requests: Callable[[], None]) -> None:
        self._admission = admission
        self._timeout_s = timeout_s
        self._end_requests = end_requests
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()

    @property
    def was_asked(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        """A signal: the first asks for the end, the second for it at once."""
        (self._hurried if self.was_asked else self._asked).set()

    async def run(self) -> bool:
        """Wait for a signal, then until nothing is being answered any more. Returns False if some request would not end."""
        await self._asked.wait()
        admission = self._admission
        admission.draining = True
        if admission.num_running:
            logger.info("Shutting down: %d requests have %g s to finish", admission.num_running, self._timeout_s)
        waits = [asyncio.ensure_future(event.wait()) for event in (admission.idle, self._hurried)]
        await asyncio.wait(waits, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not admission.idle.is_set():
            logger.warning("%d requests end unfinished: the server is shutting down", admission.num_running)
            self._end_requests()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(admission.idle.wait(), _LAST_WORDS_S)
        return admission.idle.is_set()
