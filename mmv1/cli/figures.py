"""The figures of a load: vLLM's names for the keys, and its layout for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

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
    "output_throughput": "Output token throughput (tok/s):",
    "total_token_throughput": "Total token throughput (tok/s):",
}
_TIMES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def figures_of(samples: Sequence[Sample], duration_s: float) -> dict[str, Any]:
    """Times in milliseconds, over the requests that were answered; of time per output token, over those with two tokens or more.
    A figure of nothing is 0, as vLLM's."""
    answered = [sample for sample in samples if not sample.error]
    num_input = sum(sample.num_prompt_tokens for sample in answered)
    num_output = sum(sample.num_output_tokens for sample in answered)
    times = {
        "ttft": [sample.ttft_s for sample in answered],
        "tpot": [
            (sample.latency_s - sample.ttft_s) / (sample.num_output_tokens - 1)
            for sample in answered
            if sample.num_output_tokens > 1
        ],
        "itl": [itl for sample in answered for itl in sample.itls_s],
        "e2el": [sample.latency_s for sample in answered],
    }
    return {
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(samples) - len(answered),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(answered) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        **{key: value for name, seconds in times.items() for key, value in _statistics(name, seconds)},
        "errors": sorted({sample.error for sample in samples if sample.error})[:10],
    }


def _statistics(name: str, seconds: Sequence[float]) -> Iterator[tuple[str, float]]:
    ms = 1000 * np.array(seconds or [0.0])
    yield f"mean_{name}_ms", float(ms.mean())
    yield f"median_{name}_ms", float(np.median(ms))
    yield f"std_{name}_ms", float(ms.std())
    yield f"p99_{name}_ms", float(np.percentile(ms, 99))


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    yield " Serving Benchmark Result ".center(_WIDTH, "=")
    for key, label in _COUNTS.items():
        if result[key] is not None:
            yield f"{label:<40} {_spelled(result[key]):<10}".rstrip()
    for name, (short, title) in _TIMES.items():
        yield title.center(_WIDTH, "-")
        for statistic in ("mean", "median", "p99"):
            label = f"{statistic.upper() if statistic == 'p99' else statistic.title()} {short} (ms):"
            yield f"{label:<40} {_spelled(result[f'{statistic}_{name}_ms']):<10}".rstrip()
    yield "=" * _WIDTH


def _spelled(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
