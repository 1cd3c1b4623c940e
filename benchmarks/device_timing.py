"""Times of device work, without the host's: calls captured in a CUDA graph, which is replayed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

L2_BYTES = 64 << 20  # of the device, and something over
_REPLAYS = 5


def seconds_per_call(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Median over replays of a graph that has all `calls`, one after another, `repeats` times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    elapsed = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed.append(start.elapsed_time(end) / 1000 / (repeats * len(calls)))
    return statistics.median(elapsed)


def write_results(path: Path, rows: list[dict[str, Any]]) -> None:
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"measured_with": device, "rows": rows}, indent=1) + "\n")
