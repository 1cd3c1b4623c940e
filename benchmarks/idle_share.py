"""How busy the device was in a torch profiler's trace, and with what.

    python -m benchmarks.idle_share TRACE.json[.gz] [--from-ms A] [--to-ms B] [--top 12]

Busy is the union of all kernels and copies on all streams; idle is the rest, between the first and the last of them. Times of
kernels are sums: those of streams that run side by side can be more than the time that passed.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


def device_events(trace: Path) -> list[dict[str, Any]]:
    """In order of their beginning; `ts` and `dur` in microseconds."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        events = json.load(file)["traceEvents"]
    return sorted((event for event in events if event.get("cat") in DEVICE_WORK), key=lambda event: event["ts"])


def idle_gaps(events: list[dict[str, Any]]) -> list[float]:
    """Microseconds in which nothing ran, one number for each gap."""
    gaps, busy_until = [], events[0]["ts"]
    for event in events:
        if event["ts"] > busy_until:
            gaps.append(event["ts"] - busy_until)
        busy_until = max(busy_until, event["ts"] + event["dur"])
    return gaps


def summary(events: list[dict[str, Any]], top: int) -> dict[str, Any]:
    elapsed = max(event["ts"] + event["dur"] for event in events) - events[0]["ts"]
    gaps = idle_gaps(events)
    times: Counter[str] = Counter()
    for event in events:
        times[event["name"]] += event["dur"]
    return {
        "elapsed_ms": elapsed / 1e3,
        "idle_share": sum(gaps) / elapsed,
        "idle_share_of_gaps_over_100_us": sum(gap for gap in gaps if gap > 100) / elapsed,
        "longest_gap_ms": max(gaps, default=0.0) / 1e3,
        "share_by_kernel": {name: time / elapsed for name, time in times.most_common(top)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--from-ms", type=float, default=0.0, metavar="A", help="after the first event")
    parser.add_argument("--to-ms", type=float, default=float("inf"), metavar="B")
    parser.add_argument("--top", type=int, default=12)
    args = parser.parse_args()
    events = device_events(args.trace)
    if not events:
        raise SystemExit("the trace has no device work")
    first = events[0]["ts"]
    chosen = [event for event in events if args.from_ms <= (event["ts"] - first) / 1e3 <= args.to_ms]
    figures = summary(chosen, args.top)
    shares = figures.pop("share_by_kernel")
    print(json.dumps(figures))
    for name, share in shares.items():
        print(f"{100 * share:6.2f} %  {name[:110]}")


if __name__ == "__main__":
    main()
