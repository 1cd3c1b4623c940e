"""The figures of a load: vLLM's names for the keys, and its layout for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmv1.cli.load import Sample

_WIDTH = 50
_COUNTS = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "max_concurrency": "Maximum request concurrency:",
    "request_rate": "Request rate configured (RPS):",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "total_token_throughput": "Total token throughput (tok/s):",
    "floor_request_throughput": "Request throughput of the floor (req/s):",
    "achieved_of_floor": "Achieved / floor:",
}
TIMES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def figures_of(
    samples: Sequence[Sample],
    duration_s: float,
    *,
    metrics: Sequence[str] = tuple(TIMES),
    percentiles: Sequence[float] = (99.0,),
    goodput_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Times in milliseconds, over the requests that were answered; of time per output token, over those with two tokens or more.
    A figure of nothing is 0, as vLLM's. `goodput_ms`: the most a request may take of each time named and still be a good one."""
    answered = [sample for sample in samples if not sample.error]
    num_input = sum(sample.num_prompt_tokens for sample in answered)
    num_output = sum(sample.num_output_tokens for sample in answered)
    num_events = sum(1 + len(sample.itls_s) for sample in answered)
    times = {
        "ttft": [sample.ttft_s for sample in answered],
        "tpot": [_tpot_s(sample) for sample in answered if sample.num_output_tokens > 1],
        "itl": [itl for sample in answered for itl in sample.itls_s],
        "e2el": [sample.latency_s for sample in answered],
    }
    good = sum(_is_good(sample, goodput_ms) for sample in answered) if goodput_ms else None
    return {
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(samples) - len(answered),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(answered) / duration_s,
        "request_goodput": None if good is None else good / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "tokens_per_event": num_output / num_events if num_events else 0.0,
        **{key: value for name in metrics for key, value in _statistics(name, times[name], percentiles)},
        "errors": sorted({sample.error for sample in samples if sample.error})[:10],
    }


def details_of(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Every request by itself, in the order sent; seconds. The keys are vLLM's, who has them with --save-detailed too."""
    return {
        "input_lens": [sample.num_prompt_tokens for sample in samples],
        "output_lens": [sample.num_output_tokens for sample in samples],
        "ttfts": [sample.ttft_s for sample in samples],
        "itls": [sample.itls_s for sample in samples],
        "generated_texts": [sample.text for sample in samples],
        "errors": [sample.error for sample in samples],
    }


def _tpot_s(sample: Sample) -> float:
    """0 for an answer of one token: it has no second one that could be late."""
    return (sample.latency_s - sample.ttft_s) / max(1, sample.num_output_tokens - 1)


def _is_good(sample: Sample, goodput_ms: Mapping[str, float]) -> bool:
    times_s = {"ttft": sample.ttft_s, "tpot": _tpot_s(sample), "e2el": sample.latency_s}
    return all(1000 * times_s[name] <= most for name, most in goodput_ms.items())


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> Iterator[tuple[str, float]]:
    import numpy as np

    ms = 1000 * np.array(seconds or [0.0])
    yield f"mean_{name}_ms", float(ms.mean())
    yield f"median_{name}_ms", float(np.median(ms))
    yield f"std_{name}_ms", float(ms.std())
    for percentile in percentiles:
        yield f"p{percentile:g}_{name}_ms", float(np.percentile(ms, percentile))


def lines_of(result: Mapping[str, Any]) -> Iterator[str]:
    yield " Serving Benchmark Result ".center(_WIDTH, "=")
    for key, label in _COUNTS.items():
        if result.get(key) is not None:
            yield _line(label, result[key])
    for name, (short, title) in TIMES.items():
        statistics = [key.removesuffix(f"_{name}_ms") for key in result if key.endswith(f"_{name}_ms")]
        if statistics:
            yield title.center(_WIDTH, "-")
        for statistic in statistics:
            if statistic != "std":
                yield _line(f"{statistic.title()} {short} (ms):", result[f"{statistic}_{name}_ms"])
    yield "=" * _WIDTH


def _line(label: str, value: Any) -> str:
    spelled = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {spelled:<10}".rstrip()
