"""One line on stderr: how many pictures are done, how fast, how long it will take, and which stage holds the others up.

The stage follows from what the engine says of itself. Is it busy, the stage that takes most of its time is the bottleneck;
is it not, pictures do not come fast enough: they wait for a decoder, or are not even there.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from mmv1.batch.backend import Load

_BUSY = 0.7  # share of the time; below it, what the engine waits for decides
_MIN_WINDOW_S = 0.5
_ENGINE_STAGES = {"encode": "encoding pictures", "prefill": "prefill", "decode": "decoding text"}
# Pictures in these are on their way to the engine; in "slab" they wait for it, and for "store_set" nobody waits.
_PICTURE_STAGES = {
    "fetch": "decoding pictures", "store_get": "Redis", "queue": "decoding pictures", "decode": "decoding pictures",
    "resize": "decoding pictures",
}  # fmt: skip


def bottleneck(before: Load, after: Load, elapsed_s: float) -> str | None:
    """In words; None when nothing went on, or the server does not say enough."""
    engine = {stage: after.engine_seconds.get(stage, 0.0) - before.engine_seconds.get(stage, 0.0) for stage in _ENGINE_STAGES}
    pictures = {stage: after.stage_seconds.get(stage, 0.0) - before.stage_seconds.get(stage, 0.0) for stage in _PICTURE_STAGES}
    if not any(engine.values()):
        return None
    if sum(engine.values()) >= _BUSY * elapsed_s:
        return _ENGINE_STAGES[max(engine, key=engine.__getitem__)]
    # Little's law: seconds spent in a stage by all pictures, per second, is how many are there at a time.
    if sum(pictures.values()) >= elapsed_s:
        return _PICTURE_STAGES[max(pictures, key=pictures.__getitem__)]
    return "reading pictures"


class Progress:
    """On one thread."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        from tqdm import tqdm

        interval_s = 0.2 if stream.isatty() else 10.0  # a log file need not have every step
        self._bar = tqdm(
            unit=" pictures", desc="Captions", file=stream, mininterval=interval_s, maxinterval=interval_s,
            dynamic_ncols=True, smoothing=0.1,
        )  # fmt: skip
        self._last: tuple[float, Load] | None = None
        self._num_failed = 0
        self._stage: str | None = None

    def set_total(self, total: int) -> None:
        self._bar.total = total

    def set_skipped(self, count: int) -> None:
        """So many pictures were done before: progress, but no work."""
        self._bar.n += count - self._bar.initial
        self._bar.last_print_n += count - self._bar.initial
        self._bar.initial = count

    def finish(self, *, failed: bool) -> None:
        self._num_failed += failed
        self._bar.update()

    def show_load(self, load: Load | None) -> None:
        """What the engine says, every second or so."""
        if load is None:
            return
        now = time.monotonic()
        if self._last is not None:
            elapsed_s = now - self._last[0]
            if elapsed_s < _MIN_WINDOW_S:
                return
            self._stage = bottleneck(self._last[1], load, elapsed_s) or self._stage
        self._last = (now, load)
        parts = [f"bottleneck: {self._stage}"] if self._stage else []
        parts += [f"{self._num_failed} failed"] if self._num_failed else []
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def close(self, *, was_finished: bool) -> None:
        if was_finished:
            self._bar.total = self._bar.n  # of a shard it was an estimate
        self._bar.close()
