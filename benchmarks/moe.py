"""A mixture of experts at Qwen3-30B-A3B's shapes: the grouped kernels beside torch's grouped products and beside the floor.

    python benchmarks/moe.py [--tokens 1 8 64 512 4096] [--tb-per-s 3.0] [--tflop-per-s 800] [--out FILE]

Routing is random, and different in each of eight calls, which take turns: what one leaves in the L2 cache is of little use to
the next.
The floor is the time that reading the weights of the experts that are hit takes, or the products, whichever is longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_timing import seconds_per_call, write_results

from mmv1.kernels import fused

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
WEIGHT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2  # of an expert
CALLS = 8


def grouped_mm(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The same by torch alone: tokens sorted by expert, two grouped products, and all put back."""
    by_expert, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(NUM_EXPERTS, device=x.device, dtype=ids.dtype), right=True).int()
    gated = fused.silu_and_mul(torch._grouped_mm(x[order // TOP_K], gate_up.transpose(1, 2), offs=ends))
    products = torch._grouped_mm(gated, down.transpose(1, 2), offs=ends)
    placed = torch.empty_like(products).index_copy_(0, order, products)
    return (placed.unflatten(0, (-1, TOP_K)) * weights.unsqueeze(-1)).sum(dim=1)


class Bench:
    def __init__(self) -> None:
        make: Any = {"device": "cuda", "dtype": torch.bfloat16}
        self.gate_up = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, **make).mul_(HIDDEN**-0.5)
        self.down = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, **make).mul_(INTERMEDIATE**-0.5)

    def run(self, tokens: int, bytes_per_s: float, flop_per_s: float) -> dict[str, Any]:
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        logits = [torch.randn(tokens, NUM_EXPERTS, device="cuda", dtype=torch.bfloat16) for _ in range(CALLS)]
        routes = [fused.route(each, TOP_K, True) for each in logits]
        hit = sum(ids.unique().numel() for _, ids in routes) / CALLS
        floor_s = max(hit * WEIGHT_BYTES / bytes_per_s, 6 * tokens * TOP_K * HIDDEN * INTERMEDIATE / flop_per_s)
        repeats = max(1, int(0.02 / floor_s / CALLS))

        def seconds(function: Callable[..., torch.Tensor]) -> float:
            return seconds_per_call([partial(function, x, self.gate_up, self.down, *each) for each in routes], repeats)

        if not torch.allclose(fused.experts(x, self.gate_up, self.down, *routes[0]).float(),
                              grouped_mm(x, self.gate_up, self.down, *routes[0]).float(), rtol=0.03, atol=0.03):  # fmt: skip
            raise RuntimeError(f"the kernels and torch differ at {tokens} tokens")
        route_s = seconds_per_call([partial(fused.route, each, TOP_K, True) for each in logits], 20)
        fused_s, torch_s = seconds(fused.experts), seconds(grouped_mm)
        print(f"{tokens:5} tokens {hit:6.1f} experts   floor {floor_s * 1e6:8.1f} us   fused {fused_s * 1e6:8.1f} "
              f"({floor_s / fused_s:4.0%} of it reached)   torch {torch_s * 1e6:8.1f}   route {route_s * 1e6:5.1f}", flush=True)
        return {"tokens": tokens, "experts_hit": hit, "floor_us": floor_s * 1e6, "fused_us": fused_s * 1e6,
                "torch_us": torch_s * 1e6, "route_us": route_s * 1e6}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096])
    parser.add_argument("--tb-per-s", type=float, default=3.0, help="memory bandwidth of the device, read (default: an H100's)")
    parser.add_argument("--tflop-per-s", type=float, default=800.0, help="its bfloat16 products (default: an H100's)")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    bench = Bench()
    rows = [bench.run(tokens, args.tb_per_s * 1e12, args.tflop_per_s * 1e12) for tokens in args.tokens]
    if args.out:
        write_results(args.out, rows)


if __name__ == "__main__":
    main()
