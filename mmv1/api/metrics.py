"""What /metrics says. Names are vLLM's with the prefix `mmv1:`, in a registry of this server's own.

Counters of the engine, the preprocessor and the embedder are kept there, cumulative, and read when somebody asks; only what a
client feels (latencies, finished requests, prompt tokens) is counted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client import Histogram as ClientHistogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from mmv1.api.admission import first_token
from mmv1.embedding.embedder import Embedder
from mmv1.preprocess.pictures import PreprocessStats
from mmv1.preprocess.timings import Histogram, StageTimings
from mmv1.types import SchedulerStats

_SECONDS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)

Row = tuple[str, str, str]  # name on /metrics, field of the stats, help

_ENGINE_GAUGES: tuple[Row, ...] = (
    ("num_requests_running", "num_running", "Requests in the engine's batch"),
    ("num_requests_waiting", "num_waiting", "Requests waiting for the engine's batch"),
    ("encoder_cache_bytes", "encoder_cache_bytes", "Bytes of picture embeddings kept, referenced or not"),
    ("encoder_cache_capacity_bytes", "encoder_cache_capacity_bytes", "Size of the encoder cache"),
)
_ENGINE_COUNTERS: tuple[Row, ...] = (
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    ("encoder_cache_queries", "encoder_cache_queries", "Pictures a request needed embedded"),
    ("encoder_cache_hits", "encoder_cache_hits", "Pictures found in the encoder cache"),
    ("images_encoded", "num_images_encoded", "Pictures run through the vision tower"),
    ("pixel_requests", "num_pixel_requests", "Pictures whose pixels the engine asked for"),
    ("num_preemptions", "num_preemptions", "Requests put back to waiting for want of KV blocks"),
    ("prompt_tokens_computed", "num_prompt_tokens_computed", "Prompt tokens run through the model"),
    ("generation_tokens", "num_generation_tokens", "Tokens generated"),
    ("engine_steps", "num_steps", "Steps of the engine"),
    ("encode_seconds", "encode_seconds", "Time the device worked at the vision tower"),
    ("prefill_seconds", "prefill_seconds", "Time the device worked at prompts"),
    ("decode_seconds", "decode_seconds", "Time the device worked at generated tokens"),
)
_PREPROCESS_GAUGES: tuple[Row, ...] = (
    ("preprocess_slab_bytes", "slab_bytes", "Size of the shared memory for processed pictures"),
    ("preprocess_slab_pinned_bytes", "slab_pinned_bytes", "Of it, bytes that some request needs"),
    ("preprocess_slab_free_bytes", "slab_free_bytes", "Of it, bytes that hold nothing"),
    ("preprocess_waiting", "num_waiting_for_slab", "Pictures waiting for room in the shared memory"),
    ("preprocess_encoded_bytes", "encoded_bytes", "Bytes of encoded pictures kept for live requests"),
    ("preprocess_store_up", "store_is_up", "1 while the shared store is used, 0 without one or while it is left alone"),
)
_PREPROCESS_COUNTERS: tuple[Row, ...] = (
    ("preprocess_images", "num_images_probed", "Pictures that came with requests"),
    ("preprocess_decodes", "num_decodes", "Pictures decoded and resized"),
    ("preprocess_decode_failures", "num_decode_failures", "Pictures that could not be decoded"),
    ("preprocess_decode_seconds", "decode_seconds", "Time spent decoding and resizing"),
    ("preprocess_slab_hits", "num_slab_hits", "Pictures found processed in the shared memory"),
    ("preprocess_slab_evictions", "num_slab_evictions", "Processed pictures dropped for others"),
    ("preprocess_store_hits", "num_store_hits", "Pictures found processed in the shared store"),
    ("preprocess_store_misses", "num_store_misses", "Pictures not found in the shared store"),
    ("preprocess_store_failures", "num_store_failures", "Look-ups in the shared store not answered, pictures it did not take"),
    ("preprocess_store_saves", "num_store_saves", "Processed pictures written to the shared store"),
    ("preprocess_store_saves_skipped", "num_store_saves_skipped", "Processed pictures not written to the shared store"),
    ("preprocess_lease_waits", "num_lease_waits", "Pictures waited for while another server made them"),
    ("preprocess_fetches", "num_fetches", "Pictures downloaded"),
    ("preprocess_fetched_bytes", "fetched_bytes", "Bytes downloaded"),
    ("preprocess_worker_deaths", "num_worker_deaths", "Decoding processes that died and were replaced"),
)
_EMBEDDING_GAUGES: tuple[Row, ...] = (
    ("embedding_cache_bytes", "cache_bytes", "Bytes of kept embeddings of pictures"),
    ("embedding_cache_capacity_bytes", "cache_capacity_bytes", "Bytes of them that are kept at most"),
)
_EMBEDDING_COUNTERS: tuple[Row, ...] = (
    ("embedding_requests", "num_requests", "Requests for embeddings that were answered"),
    ("embedding_texts", "num_texts", "Texts run through the embedding model"),
    ("embedding_images", "num_images", "Pictures run through the embedding model"),
    ("embedding_cache_queries", "cache_queries", "Pictures whose embedding was asked for"),
    ("embedding_cache_hits", "cache_hits", "Of these, found, or being made for somebody else"),
    ("embedding_process_deaths", "num_process_deaths", "Processes of the embedding model that ended and were replaced"),
)


def kv_cache_usage(stats: SchedulerStats) -> float:
    """The share of KV blocks that live requests hold, 0 to 1."""
    return stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0


Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _sample(label: list[str], kind: Kind, name: str, text: str, value: float) -> GaugeMetricFamily | CounterMetricFamily:
    family = kind(f"mmv1:{name}", text, labels=["model_name"])
    family.add_metric(label, value)
    return family


class _EmbeddingCollector:
    """The same of the embedding model, under its own name."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def collect(self) -> Iterator[Metric]:
        stats = self._embedder.stats()
        for kind, rows in ((GaugeMetricFamily, _EMBEDDING_GAUGES), (CounterMetricFamily, _EMBEDDING_COUNTERS)):
            for name, field, text in rows:
                yield _sample([self._embedder.name], kind, name, text, getattr(stats, field))


class _EngineCollector:
    """Reads at each scrape what is counted without Prometheus: by the engine, by the preprocessor, and for every token."""

    def __init__(
        self,
        model_name: str,
        read_stats: Callable[[], SchedulerStats],
        read_preprocess: Callable[[], PreprocessStats],
        timings: StageTimings,
        token_latency: Histogram,
    ) -> None:
        self._label = [model_name]
        self._read_stats = read_stats
        self._read_preprocess = read_preprocess
        self._timings = timings
        self._token_latency = token_latency

    def collect(self) -> Iterator[Metric]:
        stats, preprocess = self._read_stats(), self._read_preprocess()
        text = "Share of KV blocks that live requests hold, 0 to 1"
        yield _sample(self._label, GaugeMetricFamily, "kv_cache_usage_perc", text, kv_cache_usage(stats))
        for source, kind, rows in (
            (stats, GaugeMetricFamily, _ENGINE_GAUGES),
            (stats, CounterMetricFamily, _ENGINE_COUNTERS),
            (preprocess, GaugeMetricFamily, _PREPROCESS_GAUGES),
            (preprocess, CounterMetricFamily, _PREPROCESS_COUNTERS),
        ):
            for name, field, text in rows:
                yield _sample(self._label, kind, name, text, getattr(source, field))
        text = "Time pictures take, by stage: fetch, slab, store_get, queue, decode, resize, store_set"
        family = HistogramMetricFamily("mmv1:preprocess_seconds", text, labels=["model_name", "stage"])
        for stage, histogram in self._timings.histograms.items():
            self._add_histogram(family, [*self._label, stage], histogram)
        yield family
        name, text = "mmv1:inter_token_latency_seconds", "Time from token to token"
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        self._add_histogram(family, self._label, self._token_latency)
        yield family

    def _add_histogram(self, family: HistogramMetricFamily, label: list[str], histogram: Histogram) -> None:
        bounds = [*map(str, histogram.bounds_s), "+Inf"]
        family.add_metric(label, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum_s)


class Metrics:
    """One server's metrics. `start_request` opens the clock of a client's request."""

    def __init__(
        self,
        model_name: str,
        read_stats: Callable[[], SchedulerStats],
        read_preprocess: Callable[[], PreprocessStats],
        timings: StageTimings,
        embedder: Embedder | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        # Observed for every token of every stream: plain counting costs a third of what prometheus_client's locks do.
        self.inter_token_latency = Histogram(_TOKEN_SECONDS)
        self._registry.register(_EngineCollector(model_name, read_stats, read_preprocess, timings, self.inter_token_latency))
        if embedder is not None:
            self._registry.register(_EmbeddingCollector(embedder))
        self._model_name = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests, cached ones included")
        self.admission_rejections = self._counter("admission_rejections", "Requests refused because too many waited")
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Request to first token", _SECONDS)
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Request to the end of its answer", _SECONDS)
        self._success = Counter(
            "mmv1:request_success",
            "Answers by how they ended: stop, length, abort, error",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"mmv1:{name}", text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> ClientHistogram:
        family = ClientHistogram(f"mmv1:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return family.labels(self._model_name)

    def start_request(self) -> RequestTimer:
        return RequestTimer(self)

    def count_finished(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def render(self) -> bytes:
        """Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class RequestTimer:
    """The clock of one client's request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last_token: float | None = None
        self._finished = False

    def output(self, num_prompt_tokens: int, num_new_tokens: int) -> None:
        now = time.perf_counter()
        if self._last_token is None:
            first_token()
            self._metrics.time_to_first_token.observe(now - self._start)
            self._metrics.prompt_tokens.inc(num_prompt_tokens)
        elif num_new_tokens:
            self._metrics.inter_token_latency.observe(now - self._last_token)
        self._last_token = now

    def finish(self, reason: str) -> None:
        """One answer ended; of n answers to one prompt, each is counted."""
        self._finished = True
        self._metrics.count_finished(reason)
        self._metrics.e2e_latency.observe(time.perf_counter() - self._start)

    def finish_unless_finished(self, reason: str) -> None:
        if not self._finished:
            self.finish(reason)
