"""Products of few tokens with the weights of Qwen2.5-VL 7B and 3B: the skinny kernel in many configurations beside F.linear.

    python benchmarks/linear.py [--shapes NAME ...] [--tokens 1 2 4 8 16] [--out FILE]

Weights come in as many copies as the L2 cache cannot hold, and take turns. o and down are timed with the addition and
normalisation that follow and, for the skinny kernel, sum its parts. GB/s count the weight alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from device_timing import L2_BYTES, seconds_per_call, write_results

from mmv1.kernels.linear import SkinnyConfig, skinny_config, skinny_linear, skinny_partial
from mmv1.kernels.norm import add_rms_norm

GRAPH_BYTES = 2 << 30  # read in one graph: about 0.7 ms
TOO_SLOW = 1.15  # a configuration this much slower than the best at the first number of tokens is not tried at the others


class Shape(NamedTuple):
    name: str
    rows: int
    width: int
    bias: bool
    partial: bool


SHAPES = (
    Shape("7B qkv", 4608, 3584, True, False), Shape("7B o", 3584, 3584, False, True),
    Shape("7B gate_up", 37888, 3584, False, False), Shape("7B down", 3584, 18944, False, True),
    Shape("7B lm_head", 152064, 3584, False, False),
    Shape("3B qkv", 2560, 2048, True, False), Shape("3B o", 2048, 2048, False, True),
    Shape("3B gate_up", 22016, 2048, False, False), Shape("3B down", 2048, 11008, False, True),
    Shape("3B lm_head", 151936, 2048, False, False),
)  # fmt: skip
TILES = [(16, 256, 2, 4), (16, 512, 4, 3), (16, 128, 1, 6), (32, 128, 4, 5), (32, 256, 4, 4), (32, 512, 8, 3), (64, 128, 4, 5),
         (64, 256, 8, 3)]
SPLITS = (1, 2, 4, 7)


def configs(shape: Shape) -> list[SkinnyConfig]:
    """Tiles and splits that give every multiprocessor work, and a program's loop two steps at least."""
    found = {skinny_config(shape.rows, partial=shape.partial)}
    for block_n, block_k, num_warps, num_stages in TILES:
        for split in SPLITS:
            programs = -(-shape.rows // block_n) * split
            if programs >= 128 and (split == 1 or programs <= 2000) and shape.width >= 2 * block_k * split:
                found.add(SkinnyConfig(block_n, block_k, split, num_warps, num_stages))
    return sorted(found)


class Bench:
    """One shape's tensors."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.bytes = shape.rows * shape.width * 2
        copies = max(1, -(-4 * L2_BYTES // self.bytes))
        make: Any = {"device": "cuda", "dtype": torch.bfloat16}
        self.weights = [torch.randn(shape.rows, shape.width, **make).mul_(shape.width**-0.5) for _ in range(copies)]
        self.bias = torch.randn(shape.rows, **make) if shape.bias else None
        self.norm, self.residual = torch.ones(shape.rows, **make), torch.randn(16, shape.rows, **make)
        self.x = torch.randn(16, shape.width, **make)

    def torch_call(self, tokens: int, weight: torch.Tensor) -> Callable[[], Any]:
        x, residual = self.x[:tokens], self.residual[:tokens]
        if self.shape.partial:
            return lambda: add_rms_norm(F.linear(x, weight), residual, self.norm, 1e-6)
        return lambda: F.linear(x, weight, self.bias)

    def skinny_call(self, tokens: int, config: SkinnyConfig, weight: torch.Tensor) -> Callable[[], Any]:
        x, residual = self.x[:tokens], self.residual[:tokens]
        if self.shape.partial:
            return lambda: add_rms_norm(skinny_partial(x, weight, config), residual, self.norm, 1e-6)
        return lambda: skinny_linear(x, weight, self.bias, config)

    def seconds(self, make_call: Callable[[torch.Tensor], Callable[[], Any]]) -> float:
        repeats = max(1, GRAPH_BYTES // self.bytes // len(self.weights))
        return seconds_per_call([make_call(weight) for weight in self.weights], repeats)

    def check(self, config: SkinnyConfig) -> None:
        """Raises RuntimeError for a configuration that gives something else than torch."""
        expected, actual = self.torch_call(13, self.weights[0])(), self.skinny_call(13, config, self.weights[0])()
        pairs = zip(expected, actual, strict=True) if self.shape.partial else [(expected, actual)]
        for a, b in pairs:
            if not torch.allclose(a.float(), b.float(), rtol=0.03, atol=0.06):
                raise RuntimeError(f"{self.shape.name}: {config} is off by {(a.float() - b.float()).abs().max()}")

    def run(self, token_counts: list[int]) -> list[dict[str, Any]]:
        candidates, chosen = configs(self.shape), skinny_config(self.shape.rows, partial=self.shape.partial)
        rows = []
        for config in candidates:
            self.check(config)
        for tokens in token_counts:
            torch_s = self.seconds(partial(self.torch_call, tokens))
            timed = {config: self.seconds(partial(self.skinny_call, tokens, config)) for config in candidates}
            best = min(timed, key=timed.__getitem__)
            rows.append({"shape": self.shape.name, "tokens": tokens, "torch_us": torch_s * 1e6, "best": list(best),
                         "best_us": timed[best] * 1e6, "chosen": list(chosen), "chosen_us": timed[chosen] * 1e6,
                         "configs": [[*c, round(s * 1e6, 2)] for c, s in sorted(timed.items(), key=lambda item: item[1])]})
            candidates = [c for c in candidates if timed[c] <= TOO_SLOW * timed[best] or c == chosen]
            print(f"{self.shape.name:11} {tokens:2}  torch {torch_s * 1e6:7.2f} us {self.bytes / torch_s / 1e9:5.0f} GB/s   best "
                  f"{timed[best] * 1e6:7.2f} {self.bytes / timed[best] / 1e9:5.0f} {tuple(best)!s:22}  "
                  f"chosen {timed[chosen] * 1e6:7.2f} {self.bytes / timed[chosen] / 1e9:5.0f} {tuple(chosen)}", flush=True)
        return rows


def compile_all(shapes: list[Shape]) -> None:
    """Every kernel that is going to be timed, compiled on all cores."""

    def launch(shape: Shape, config: SkinnyConfig) -> None:
        x = torch.zeros(1, shape.width, device="cuda", dtype=torch.bfloat16)
        weight = torch.zeros(shape.rows, shape.width, device="cuda", dtype=torch.bfloat16)
        if shape.partial:
            add_rms_norm(skinny_partial(x, weight, config), x.new_zeros(1, shape.rows), x.new_zeros(shape.rows), 1e-6)
        else:
            skinny_linear(x, weight, x.new_zeros(shape.rows) if shape.bias else None, config)

    # The number of rows is compiled in by the normalisation alone; elsewhere it matters only that 16 divides it.
    jobs = {
        (shape._replace(name="", rows=shape.rows if shape.partial else 16), config)
        for shape in shapes for config in configs(shape)
    }  # fmt: skip
    launch(*jobs.pop())  # Triton finds the device
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(launch, *job) for job in jobs]:
            future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--out", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    started = time.perf_counter()
    compile_all(shapes)
    print(f"compiled in {time.perf_counter() - started:.1f} s; configurations are {SkinnyConfig._fields}")
    rows = []
    for shape in shapes:
        rows += Bench(shape).run(args.tokens)
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - started:.1f} s in all")
    if args.out:
        write_results(args.out, rows)


if __name__ == "__main__":
    main()
