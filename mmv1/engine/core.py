"""EngineCore: the step loop. Torch-free; knows messages, a scheduler and an executor.

One condition wakes it: an event, which is a message from the API server or the completion of a step. It schedules the next
step while up to `max_steps_in_flight` - 1 earlier ones run, applies results in order, and says after each what there is to say.
It never spins: with nothing to schedule it waits.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from mmv1.engine.executor import Executor
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import ModelRunnerOutput, SchedulerOutput, StageSeconds
from mmv1.types import (
    Abort,
    EngineCoreInput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FeatureFailed,
    FeatureReady,
    Ping,
    Pong,
    ResetCaches,
    SlabShort,
)

_STEP_DONE = object()
_STOP = object()


class EngineCore:
    """`publish` is called on the loop's thread with everything there is to tell the API server."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        publish: Callable[[EngineCoreOutputs], None],
        *,
        max_steps_in_flight: int = 2,
    ) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._publish = publish
        self._max_steps_in_flight = max_steps_in_flight
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._in_flight: deque[tuple[SchedulerOutput, Future[ModelRunnerOutput]]] = deque()
        self._progress_at = time.monotonic()  # when a step was last finished, or the first request came
        self._outbox = EngineCoreOutputs()
        self._stopping = False

    # ---- called from other threads --------------------------------------------------------------------------------------

    def post(self, message: EngineCoreInput) -> None:
        self._events.put(message)

    def stop(self) -> None:
        """Make `run` return after the steps in flight."""
        self._events.put(_STOP)

    def fail(self, error: Exception) -> None:
        """Make `run` raise this: something it depends on has ended."""
        self._events.put(error)

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until stopped. An exception from here, a failed step's included, means the engine is dead."""
        while not self._stopping or self._in_flight:
            self.run_once()
        self._executor.shutdown()

    def run_once(self) -> None:
        """Launch what can be launched; take in all events there are, waiting for one if nothing else can be done; apply what
        finished; tell."""
        may_launch_more = self._launch()
        self._collect_pixel_messages()
        if not may_launch_more:
            self._tell()  # nothing may be left untold while waiting
        self._take_events(wait=not may_launch_more)
        while self._in_flight and self._in_flight[0][1].done():
            step, future = self._in_flight.popleft()
            self._progress_at = time.monotonic()
            result = future.result()
            self._outbox.outputs += self.scheduler.update(step, result)
            self._count_seconds(result.seconds)
        self._outbox.outputs += self.scheduler.take_failed()
        self._collect_pixel_messages()
        self._tell()

    def _count_seconds(self, seconds: StageSeconds) -> None:
        stats = self.scheduler.stats
        stats.encode_seconds += seconds.encode
        stats.prefill_seconds += seconds.prefill
        stats.decode_seconds += seconds.decode

    def _launch(self) -> bool:
        """Schedule and submit one step if there is one and room for it. Whether it is worth trying again at once."""
        if self._stopping or len(self._in_flight) >= self._max_steps_in_flight:
            return False
        step = self.scheduler.schedule()
        if step is None:
            return False
        future = self._executor.submit(step)
        self._in_flight.append((step, future))
        future.add_done_callback(lambda _: self._events.put(_STEP_DONE))
        return len(self._in_flight) < self._max_steps_in_flight

    def _take_events(self, *, wait: bool) -> None:
        try:
            event = self._events.get(block=wait)
            while True:
                self._handle(event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass

    def _handle(self, event: object) -> None:
        scheduler = self.scheduler
        match event:
            case EngineCoreRequest():
                if not scheduler.has_requests:
                    self._progress_at = time.monotonic()
                scheduler.add_request(event)
            case FeatureReady():
                scheduler.pixels_ready(event)
            case Abort():
                scheduler.abort(event.request_ids)
                self._outbox.stats = scheduler.snapshot()  # gauges have fallen, and perhaps nothing else is left to tell
            case FeatureFailed():
                scheduler.pixels_failed(event)
            case SlabShort():
                scheduler.slab_short()
            case Ping():
                stalled_s = time.monotonic() - self._progress_at if scheduler.has_requests else 0.0
                self._outbox.pong = Pong(event.ping_id, stalled_s)
            case ResetCaches():
                scheduler.reset_caches()
            case Exception():
                raise event
            case _ if event is _STOP:
                self._stopping = True
                scheduler.abort(list(scheduler.requests))

    def _collect_pixel_messages(self) -> None:
        requests, releases = self.scheduler.take_pixel_messages()
        if releases and self._outbox.pixel_requests:
            self._tell()  # the receiver applies a message's releases before its requests
        self._outbox.pixel_requests += requests
        self._outbox.pixel_releases += releases

    def _tell(self) -> None:
        news = self._outbox
        if news.outputs or news.pixel_requests or news.pixel_releases or news.pong or news.stats:
            news.stats = self.scheduler.snapshot()
            self._outbox = EngineCoreOutputs()
            self._publish(news)
