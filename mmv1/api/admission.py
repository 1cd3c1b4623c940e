"""How much is taken in: requests beyond what may wait are refused with 429, and all of them with 503 while the server ends.

A request waits from its first byte here until the first token of its answer, or until its end if it has none. So reading,
downloading pictures and prefill count, and no news of the engine is needed to know the number.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

from mmv1.api.access import is_open, refusal, route_path, tenant_of
from mmv1.api.settings import ServerSettings
from mmv1.errors import RequestError

RETRY_AFTER_S = 5  # where nothing better is known
_MAX_RETRY_AFTER_S = 60  # clients of OpenAI's take no longer one
_RATE_WINDOW_S = 60.0
_RATE_SAMPLES = 256


class _Turn:
    """One request's place among those that wait; left once."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def leave(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


_turn: ContextVar[_Turn | None] = ContextVar("turn", default=None)


def first_token() -> None:
    """The request that is being answered in this context waits no longer."""
    turn = _turn.get()
    if turn is not None:
        turn.leave()


class Admission:
    """Counts requests. `draining`, once set, refuses all new ones; `idle` is set while none is being answered."""

    def __init__(self, settings: ServerSettings, now: Callable[[], float] = time.monotonic) -> None:
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.num_running = 0
        self._max_queued = settings.max_queued_requests
        self._max_queued_per_tenant = settings.max_queued_requests_per_key
        self._queued: Counter[str] = Counter()  # tenant -> its requests that wait
        self._num_queued = 0
        self._left_at: deque[float] = deque(maxlen=_RATE_SAMPLES)
        self._now = now

    def start(self) -> None:
        self.num_running += 1
        self.idle.clear()

    def end(self) -> None:
        self.num_running -= 1
        if self.num_running == 0:
            self.idle.set()

    def take_turn(self, tenant: str) -> _Turn:
        """Raises RequestError (429) when too many wait, of all or of this tenant."""
        if self._max_queued is not None and self._num_queued >= self._max_queued:
            raise RequestError("Too many requests are waiting", code="rate_limit_exceeded", status=429)
        if self._max_queued_per_tenant is not None and self._queued[tenant] >= self._max_queued_per_tenant:
            message = "Too many requests with this API key are waiting"
            raise RequestError(message, code="rate_limit_exceeded", status=429)
        self._queued[tenant] += 1
        self._num_queued += 1
        return _Turn(lambda: self._leave(tenant))

    def _leave(self, tenant: str) -> None:
        self._queued[tenant] -= 1
        self._num_queued -= 1
        self._left_at.append(self._now())

    def retry_after_s(self) -> int:
        """Seconds until all that wait now have had their turn, at the rate of the last minute."""
        now = self._now()
        while self._left_at and self._left_at[0] < now - _RATE_WINDOW_S:
            self._left_at.popleft()
        if len(self._left_at) < 2:
            return RETRY_AFTER_S
        rate = len(self._left_at) / max(now - self._left_at[0], 1e-3)
        return max(1, min(math.ceil(self._num_queued / rate), _MAX_RETRY_AFTER_S))


class AdmissionControl:
    """The middleware. While the server ends, only /metrics is answered; else only POST, what computes, is ever refused."""

    def __init__(self, app: ASGIApp, admission: Admission, on_rejection: Callable[[], None]) -> None:
        self._app = app
        self._admission = admission
        self._on_rejection = on_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        admission = self._admission
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if admission.draining and route_path(scope) != "/metrics":
            error = RequestError("The server is shutting down", code="shutting_down", status=503)
            await refusal(error, {"retry-after": str(RETRY_AFTER_S)})(scope, receive, send)
            return
        turn = None
        if scope["method"] == "POST" and not is_open(scope):
            try:
                turn = admission.take_turn(tenant_of(scope))
            except RequestError as error:
                self._on_rejection()
                await refusal(error, {"retry-after": str(admission.retry_after_s())})(scope, receive, send)
                return
        admission.start()
        _turn.set(turn)
        try:
            await self._app(scope, receive, send)
        finally:
            if turn is not None:
                turn.leave()
            admission.end()
