"""EngineCore: the step loop. Torch-free; knows messages, a scheduler and an executor.

One condition wakes it: an event, which is a message from the API server or the completion of a step or an encode batch. It
schedules the next step while up to `max_steps_in_flight` - 1 earlier ones run, and beside them, in no order with them, up to
`max_encodes_in_flight` batches of pictures; it applies results, and says after each turn what there is to say. It never spins:
with nothing to schedule it waits.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from mmv1.engine.executor import Executor
from mmv1.request import TokenMatcher
from mmv1.scheduler.grammar import GrammarMatcher, Grammars
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import EncodeBatch, EncodeOutput, ModelRunnerOutput, SchedulerOutput
from mmv1.types import (
    Abort,
    EngineCoreInput,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FeatureFailed,
    FeatureReady,
    FinishReason,
    Ping,
    Pong,
    ProfileAnswer,
    ResetCaches,
    SlabShort,
    StartProfile,
    StopProfile,
)

_DONE = object()  # a step or an encode batch
_STOP = object()


class _Compiled(NamedTuple):
    """The grammar that a request has been waiting for, or why there is none."""

    request: EngineCoreRequest
    grammar: Future[GrammarMatcher]


class EngineCore:
    """`publish` is called on the loop's thread with everything there is to tell the API server."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        publish: Callable[[EngineCoreOutputs], None],
        *,
        grammars: Grammars,
        max_steps_in_flight: int = 2,
        max_encodes_in_flight: int = 2,
    ) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._publish = publish
        self._grammars = grammars
        self._compiling: set[str] = set()  # requests whose grammars are being compiled
        self._max_steps_in_flight = max_steps_in_flight
        self._max_encodes_in_flight = max_encodes_in_flight
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._in_flight: deque[tuple[SchedulerOutput, Future[ModelRunnerOutput]]] = deque()
        self._encodes_in_flight: deque[tuple[EncodeBatch, Future[EncodeOutput]]] = deque()
        self._progress_at = time.monotonic()  # when a step or a batch was last finished, or the first request came
        self._outbox = EngineCoreOutputs()
        self._stopping = False

    # ---- called from other threads --------------------------------------------------------------------------------------

    def post(self, message: EngineCoreInput) -> None:
        self._events.put(message)

    def stop(self) -> None:
        """Make `run` return after the steps and batches in flight."""
        self._events.put(_STOP)

    def fail(self, error: Exception) -> None:
        """Make `run` raise this: something it depends on has ended."""
        self._events.put(error)

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until stopped. An exception from here, a failed step's or batch's included, means the engine is dead."""
        while not self._stopping or self._in_flight or self._encodes_in_flight:
            self.run_once()
        self._executor.shutdown()

    def run_once(self) -> None:
        """Launch what can be launched; take in all events there are, waiting for one if nothing else can be done; apply what
        finished; tell."""
        launched = self._launch()
        self._collect_pixel_messages()
        if not launched:
            self._tell()  # nothing may be left untold while waiting
        self._take_events(wait=not launched)
        self._apply_results()
        self._outbox.outputs += self.scheduler.take_failed()
        self._collect_pixel_messages()
        self._tell()

    def _apply_results(self) -> None:
        stats = self.scheduler.stats
        while self._encodes_in_flight and self._encodes_in_flight[0][1].done():
            batch, encoding = self._encodes_in_flight.popleft()
            self._progress_at = time.monotonic()
            stats.encode_seconds += encoding.result().seconds
            self.scheduler.update_encode(batch)
        while self._in_flight and self._in_flight[0][1].done():
            step, future = self._in_flight.popleft()
            self._progress_at = time.monotonic()
            result = future.result()
            self._outbox.outputs += self.scheduler.update(step, result)
            stats.prefill_seconds += result.seconds.prefill
            stats.decode_seconds += result.seconds.decode

    def _launch(self) -> bool:
        """Schedule and submit what there is and is room for: encode batches before a step, since it is they that requests
        stand before. Whether anything was launched, so that it is worth trying again at once."""
        if self._stopping:
            return False
        # Once more behind the step, which may have changed what is needed or may be evicted.
        return any([self._launch_encodes(), self._launch_step(), self._launch_encodes()])

    def _launch_encodes(self) -> bool:
        launched = False
        while len(self._encodes_in_flight) < self._max_encodes_in_flight:
            batch = self.scheduler.schedule_encode()
            if batch is None:
                break
            future = self._executor.submit_encode(batch)
            self._encodes_in_flight.append((batch, future))
            future.add_done_callback(lambda _: self._events.put(_DONE))
            launched = True
        return launched

    def _launch_step(self) -> bool:
        if len(self._in_flight) >= self._max_steps_in_flight:
            return False
        step = self.scheduler.schedule()
        if step is None:
            return False
        future = self._executor.submit(step)
        self._in_flight.append((step, future))
        future.add_done_callback(lambda _: self._events.put(_DONE))
        return True

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
                self._add(event)
            case _Compiled():
                self._add_compiled(event)
            case FeatureReady():
                scheduler.pixels_ready(event)
            case Abort():
                scheduler.abort(event.request_ids)
                self._compiling.difference_update(event.request_ids)
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
            case StartProfile():
                self._profile(event.call_id, event.trace_dir)
            case StopProfile():
                self._profile(event.call_id, None)
            case ProfileAnswer():
                self._outbox.profile_answers.append(event)
            case Exception():
                raise event
            case _ if event is _STOP:
                self._stopping = True
                scheduler.abort(list(scheduler.requests))
                self._compiling.clear()

    def _add(self, request: EngineCoreRequest, grammar: TokenMatcher | None = None) -> None:
        asked = request.sampling_params.structured_outputs
        if asked is not None and grammar is None:
            self._compiling.add(request.request_id)
            compiling = self._grammars.compile(asked)
            compiling.add_done_callback(lambda done: self._events.put(_Compiled(request, done)))
            return
        if not self.scheduler.has_requests:
            self._progress_at = time.monotonic()
        self.scheduler.add_request(request, grammar)

    def _add_compiled(self, compiled: _Compiled) -> None:
        """A grammar was checked before it came here: that it cannot be compiled is this request's trouble alone."""
        request, grammar = compiled
        if request.request_id not in self._compiling:
            return  # aborted meanwhile
        self._compiling.discard(request.request_id)
        if (error := grammar.exception()) is None:
            self._add(request, grammar.result())
            return
        self._outbox.outputs.append(
            EngineCoreOutput(
                request.request_id, [], finish_reason=FinishReason.ERROR, error=str(error), error_code="invalid_grammar"
            )
        )

    def _profile(self, call_id: int, trace_dir: str | None) -> None:
        def answer(future: Future[None]) -> None:
            error = future.exception()
            self._events.put(ProfileAnswer(call_id, None if error is None else str(error)))

        self._executor.profile(trace_dir).add_done_callback(answer)

    def _collect_pixel_messages(self) -> None:
        requests, releases = self.scheduler.take_pixel_messages()
        if releases and self._outbox.pixel_requests:
            self._tell()  # the receiver applies a message's releases before its requests
        self._outbox.pixel_requests += requests
        self._outbox.pixel_releases += releases

    def _tell(self) -> None:
        news = self._outbox
        if news.outputs or news.pixel_requests or news.pixel_releases or news.pong or news.stats or news.profile_answers:
            news.stats = self.scheduler.snapshot()
            self._outbox = EngineCoreOutputs()
            self._publish(news)
