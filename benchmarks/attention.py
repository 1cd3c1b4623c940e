"""How long attention takes on a GPU, backend by backend, at the shapes of Qwen2.5-VL-7B.

    python -m benchmarks.attention --output attention.json

Medians of CUDA-graph replays over caches far larger than the device's own, bfloat16, 28 query and 4 key heads of 128, blocks of
16 tokens; in the vision tower 16 heads of 80. Then our paged kernel by configuration (keys in a step, warps, stages).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import describe
from mmv1.kernels.paged_attention import TileConfig, paged_attention
from mmv1.kernels.varlen_attention import make_segments, varlen_attention
from mmv1.runner.attention import installed_backends, make_backend
from mmv1.runner.attention.backend import AttentionMetadata
from mmv1.runner.attention.triton import choose_num_splits, make_tiles, small_tile_tokens

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 28, 4, 128, 16
VISION_HEADS, VISION_DIM = 16, 80
DEVICE = torch.device("cuda", 0)
STEPS = {  # tokens before the step and in it, of each request
    "decode 64 x 1500": [(1499, 1)] * 64,
    "decode 8 x 1500": [(1499, 1)] * 8,
    "decode 1 x 1500": [(1499, 1)],
    "decode 128 x 1500": [(1499, 1)] * 128,
    "decode 1 x 32768": [(32767, 1)],
    "prefill 6 x 1400": [(0, 1400)] * 6,
    "mixed 60 x 1450, 3 x 1400": [(1449, 1)] * 60 + [(0, 1400)] * 3,
    "mixed 60 x 1450, 1 x 256 after 1144": [(1449, 1)] * 60 + [(1144, 256)],
}
SEGMENTS = {
    "vision full 1 x 5476": [5476],
    "vision full 4 x 5476": [5476] * 4,
    "vision windows 342 x 64": [64] * 342,
    "vision windows 342 of 16 to 64": [64, 64, 32, 64, 16, 32] * 57,
}


class Step:
    """A step's tensors; of each request the blocks lie anywhere in the cache."""

    def __init__(self, step: list[tuple[int, int]]) -> None:
        self.computed, self.query_lens = (np.array(column, dtype=np.int64) for column in zip(*step, strict=True))
        self.seq_lens = self.computed + self.query_lens
        self.starts = np.cumsum(self.query_lens) - self.query_lens
        num_blocks = -(-self.seq_lens // BLOCK_SIZE)
        total, width = int(num_blocks.sum()), int(num_blocks.max())
        order = torch.randperm(total, device=DEVICE, dtype=torch.int32)
        self.block_table = torch.zeros(len(step), width, dtype=torch.int32, device=DEVICE)
        for row, (start, count) in enumerate(zip(np.cumsum(num_blocks) - num_blocks, num_blocks, strict=True)):
            self.block_table[row, :count] = order[start : start + count]
        self.kv_cache = torch.randn(2, total, BLOCK_SIZE, KV_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        self.query = torch.randn(int(self.query_lens.sum()), HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        self.key, self.value = torch.randn(2, len(self.query), KV_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        self.gigabytes = float(self.seq_lens.sum()) * 2 * KV_HEADS * DIM * 2 / 1e9
        mean_keys = self.computed + (self.query_lens + 1) / 2
        self.teraflops = float((4 * HEADS * DIM * self.query_lens * mean_keys).sum()) / 1e12

    def metadata(self) -> AttentionMetadata:
        rows = np.arange(len(self.query_lens))
        return AttentionMetadata(
            query_lens=self.query_lens,
            seq_lens=self.seq_lens,
            query_start_loc=torch.tensor([0, *np.cumsum(self.query_lens)], dtype=torch.int32, device=DEVICE),
            seq_lens_device=torch.from_numpy(self.seq_lens).int().to(DEVICE),
            rows=torch.from_numpy(rows).int().to(DEVICE),
            host_rows=rows,
            block_table=self.block_table,
            block_size=BLOCK_SIZE,
        )

    def tiled(self, tokens_per_tile: int, num_splits: int, config: TileConfig | None = None) -> Callable[[], torch.Tensor]:
        """A launch as a recorded step makes it."""
        rows = np.arange(len(self.query_lens))
        tiles = torch.from_numpy(make_tiles(rows, self.starts, self.query_lens, self.computed, tokens_per_tile)).to(DEVICE)
        return lambda: paged_attention(
            self.query, self.kv_cache, tiles, self.block_table, DIM**-0.5,
            block_size=BLOCK_SIZE, tokens_per_tile=tokens_per_tile, num_splits=num_splits, config=config,
        )  # fmt: skip


def median_ms(launch: Callable[[], Any], replays: int = 30) -> float:
    """Of one launch. Before each the device's cache is overwritten, as a model's other layers would."""
    for _ in range(3):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    scratch = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(replays):
        scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(results: dict[str, Any], name: str, kind: str, launch: Callable[[], Any], gigabytes: float, teraflops: float) -> None:
    """One line of the table. A launch that fails is part of what there is to know, and does not end the run."""
    try:
        ms = median_ms(launch)
    except Exception as error:
        results.setdefault(name, {})[kind] = {"error": repr(error)[:300]}
        print(f"{name:36} {kind:34} {repr(error)[:60]}", flush=True)
        return
    results.setdefault(name, {})[kind] = {"ms": ms, "gb_s": gigabytes / ms * 1e3, "tflop_s": teraflops / ms * 1e3}
    print(f"{name:36} {kind:34} {ms:8.4f} ms {gigabytes / ms * 1e3:7.0f} GB/s {teraflops / ms * 1e3:6.0f} TFLOP/s", flush=True)


def measure_steps(results: dict[str, Any], backends: list[str]) -> None:
    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    small = small_tile_tokens(HEADS // KV_HEADS)
    for name, layout in STEPS.items():
        step = Step(layout)
        metadata = step.metadata()
        for kind in backends:
            backend = make_backend(kind, DEVICE)
            plan = backend.plan(metadata)
            measure(
                results, name, kind,
                lambda: backend.forward(step.query, step.key, step.value, step.kv_cache, plan, DIM**-0.5),  # noqa: B023
                step.gigabytes, step.teraflops,
            )  # fmt: skip
        if len(step.query) <= 512:
            splits = choose_num_splits(len(step.query), KV_HEADS, 32768, num_sms)
            measure(results, name, f"recorded, {splits} splits", step.tiled(small, splits), step.gigabytes, step.teraflops)


def measure_segments(results: dict[str, Any], backends: list[str]) -> None:
    for name, seqlens in SEGMENTS.items():
        num_patches = sum(seqlens)
        qkv = torch.randn(num_patches, 3 * VISION_HEADS, VISION_DIM, device=DEVICE, dtype=torch.bfloat16)
        query, key, value = qkv.split(VISION_HEADS, dim=1)
        gigabytes = num_patches * 4 * VISION_HEADS * VISION_DIM * 2 / 1e9
        teraflops = sum(4 * VISION_HEADS * VISION_DIM * length**2 for length in seqlens) / 1e12
        scale = VISION_DIM**-0.5
        for kind in backends:
            backend = make_backend(kind, DEVICE)
            plan = backend.plan_varlen(seqlens, DEVICE)
            measure(
                results, name, kind, lambda: backend.varlen(query, key, value, plan, scale), gigabytes, teraflops  # noqa: B023
            )  # fmt: skip
        segments = torch.from_numpy(make_segments(seqlens, max(seqlens))).to(DEVICE)
        measure(
            results, name, "our kernel",
            lambda: varlen_attention(query, key, value, segments, scale),  # noqa: B023
            gigabytes, teraflops,
        )  # fmt: skip


def configurations() -> Iterator[tuple[str, int, int, TileConfig]]:
    """Of the kernel: step, tokens of a tile, splits and how it is compiled; what is likely to be best first."""
    for block_n, warps, stages, splits in product((64, 128, 32), (4, 8, 2), (5, 3, 7), (2, 1, 4)):
        yield "decode 64 x 1500", 1, splits, TileConfig(block_n, warps, stages)
    for block_n, stages, splits in product((64, 128), (5, 3), (8, 16, 4)):
        yield "decode 8 x 1500", 1, splits, TileConfig(block_n, 4, stages)
        yield "decode 1 x 1500", 1, splits, TileConfig(block_n, 4, stages)
    for tokens, block_n, warps, stages in product((128, 18), (64, 128), (8, 4), (3, 5, 2)):
        yield "prefill 6 x 1400", tokens, 1, TileConfig(block_n, warps, stages)


def sweep(results: dict[str, Any], seconds: float) -> None:
    """The kernel by configuration, the kinds of step in turn, for about so long."""
    deadline = time.monotonic() + seconds
    by_step: dict[str, list[tuple[int, int, TileConfig]]] = {}
    for name, *rest in configurations():
        by_step.setdefault(name, []).append((rest[0], rest[1], rest[2]))
    steps = {name: Step(STEPS[name]) for name in by_step}
    for turn in zip_longest(*([(name, *choice) for choice in choices] for name, choices in by_step.items())):
        for name, tokens, splits, config in filter(None, turn):
            if time.monotonic() > deadline:
                print("the sweep's time is up")
                return
            step = steps[name]
            kind = f"{tokens} tokens, {splits} splits, {'/'.join(map(str, config))}"
            measure(results, f"sweep {name}", kind, step.tiled(tokens, splits, config), step.gigabytes, step.teraflops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--sweep-s", type=float, default=90.0, help="seconds for the sweep over configurations; 0: none")
    args = parser.parse_args()
    backends = installed_backends(DEVICE, torch.bfloat16)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        measure_steps(results, backends)
        measure_segments(results, backends)
        if args.sweep_s:
            sweep(results, args.sweep_s)
    if args.output:
        report = {"device": torch.cuda.get_device_name(DEVICE), **describe(), "results": results}
        args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
