"""How long pictures take in each stage of this room: histograms that /metrics and the log's bottleneck line read.

Plain counting; knows nothing of Prometheus. One event loop.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Literal

# fetch: the download. slab: waiting for room. store_get, store_set: the shared store, waiting for another server's lease
# included. queue: waiting for a pool process. decode, resize: in the pool process (resize includes cutting into patches).
Stage = Literal["fetch", "slab", "store_get", "queue", "decode", "resize", "store_set"]
STAGES: tuple[Stage, ...] = ("fetch", "slab", "store_get", "queue", "decode", "resize", "store_set")

BOUNDS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192)


@dataclass(slots=True)
class Histogram:
    """`counts[i]`: observations of at most bounds_s[i] seconds and more than the bound before; the last: more than all."""

    bounds_s: tuple[float, ...] = BOUNDS_S
    counts: list[int] = field(init=False)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


class StageTimings:
    """One histogram a stage, cumulative since start."""

    def __init__(self) -> None:
        self.histograms: dict[Stage, Histogram] = {stage: Histogram() for stage in STAGES}

    def observe(self, stage: Stage, seconds: float) -> None:
        self.histograms[stage].observe(seconds)

    def seconds(self, stage: Stage) -> float:
        """Spent in `stage` by all pictures together."""
        return self.histograms[stage].sum_s
