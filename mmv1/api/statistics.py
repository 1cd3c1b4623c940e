"""The periodic lines of the log: what the engine does, every ten seconds, and where pictures spend their time, every minute.

Each line is made from the differences of cumulative counters since the one before, and there is none while nothing happens.
"""

from __future__ import annotations

from mmv1.api.metrics import kv_cache_usage
from mmv1.preprocess.pictures import PreprocessStats
from mmv1.preprocess.timings import STAGES, Stage, StageTimings
from mmv1.types import SchedulerStats


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def name_of_kv_cache(device: str) -> str:
    """As vLLM's lines call it, where there is a GPU."""
    return "KV cache" if device == "cpu" else "GPU KV cache"


class StatisticsLine:
    """Rates of the engine and its caches, in the words of vLLM's line. `device`: as the engine names it."""

    def __init__(self, device: str) -> None:
        self._kv_cache = name_of_kv_cache(device)
        self._last = SchedulerStats()
        self._last_preprocess = PreprocessStats()

    def next(self, stats: SchedulerStats, preprocess: PreprocessStats, elapsed_s: float) -> str | None:
        last, self._last = self._last, stats
        last_preprocess, self._last_preprocess = self._last_preprocess, preprocess
        if stats.num_steps == last.num_steps and not stats.num_running and not stats.num_waiting:
            return None

        def since(field: str) -> int:
            return getattr(stats, field) - getattr(last, field)

        num_decodes = preprocess.num_decodes - last_preprocess.num_decodes
        num_slab_hits = preprocess.num_slab_hits - last_preprocess.num_slab_hits
        num_found = num_slab_hits + preprocess.num_store_hits - last_preprocess.num_store_hits
        decode_ms = 1000 * (preprocess.decode_seconds - last_preprocess.decode_seconds) / max(1, num_decodes)
        return (
            f"Avg prompt throughput: {since('num_prompt_tokens_computed') / elapsed_s:.1f} tokens/s, "
            f"Avg generation throughput: {since('num_generation_tokens') / elapsed_s:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"{self._kv_cache} usage: {100 * kv_cache_usage(stats):.1f}%, "
            f"Prefix cache hit rate: {_percent(since('prefix_cache_hits'), since('prefix_cache_queries'))}, "
            f"MM cache hit rate: {_percent(num_found, num_found + num_decodes)}, "
            f"Encoder cache usage: {_percent(stats.encoder_cache_bytes, stats.encoder_cache_capacity_bytes)}, "
            f"Encoder cache hit rate: {_percent(since('encoder_cache_hits'), since('encoder_cache_queries'))}, "
            f"Preprocess: {num_decodes} images decoded, {decode_ms:.1f} ms each, {preprocess.num_waiting_for_slab} waiting"
        )


# What the stage that takes most of pictures' time is called, and what is to be done. store_set is not among them: nobody
# waits for it.
_ADVICE: dict[Stage, str] = {
    "fetch": "downloads: the hosts of the pictures, or the way to them, are slow",
    "slab": "room in the slab: raise --preprocess-slab-gb",
    "store_get": "Redis: look at its latency and at the network ({failures} failures, {lease_waits} waits for another server)",
    "queue": "waiting for a decoder: raise --preprocess-workers (now {workers}, {busy} busy)",
    "decode": "decoding itself: smaller pictures cost less",
    "resize": "resizing: smaller pictures, or a lower --max-pixels, cost less",
}


class BottleneckLine:
    """How pictures became ready, how long each stage took, and the stage on which they spent most of their time together:
    a stage that is slow for one picture of a thousand is none. `num_workers`: processes of the pool."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._last = PreprocessStats()
        self._last_totals: dict[Stage, tuple[int, float]] = dict.fromkeys(STAGES, (0, 0.0))

    def next(self, stats: PreprocessStats, timings: StageTimings, elapsed_s: float) -> str | None:
        totals = {stage: (histogram.count, histogram.sum_s) for stage, histogram in timings.histograms.items()}
        last, self._last = self._last, stats
        last_totals, self._last_totals = self._last_totals, totals
        counts = {stage: totals[stage][0] - last_totals[stage][0] for stage in STAGES}
        seconds = {stage: totals[stage][1] - last_totals[stage][1] for stage in STAGES}

        def since(field: str) -> int:
            return getattr(stats, field) - getattr(last, field)

        came, slab, store, decoded = map(since, ("num_images_probed", "num_slab_hits", "num_store_hits", "num_decodes"))
        if not (came or slab or store or decoded or any(counts.values())):
            return None
        means = [f"{stage} {1000 * seconds[stage] / counts[stage]:.1f} ({counts[stage]})" for stage in STAGES if counts[stage]]
        advice = self._bottleneck(
            seconds,
            failures=since("num_store_failures"),
            lease_waits=since("num_lease_waits"),
            workers=self._num_workers,
            busy=_percent(seconds["decode"] + seconds["resize"], self._num_workers * elapsed_s),
        )
        return (
            f"Pictures: {came} came; ready: {slab} from the slab, {store} from Redis, {decoded} decoded; "
            f"mean ms (pictures): {', '.join(means) or '-'}; bottleneck: {advice}"
        )

    def _bottleneck(self, seconds: dict[Stage, float], **facts: object) -> str:
        slowest = max(_ADVICE, key=lambda stage: seconds[stage])
        if not seconds[slowest]:
            return "none"
        share = _percent(seconds[slowest], sum(seconds[stage] for stage in _ADVICE))
        return f"{share} of the time is {_ADVICE[slowest].format(**facts)}"
