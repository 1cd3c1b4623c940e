"""The fused operations beside plain torch, at the widths of Qwen2.5-VL-7B and of its vision tower.

    python benchmarks/fused.py [--tokens 64 8192] [--patches 21904] [--out FILE]

GB/s count what an operation has to read and write. Small inputs are in the L2 cache, as they are in a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from device_timing import seconds_per_call, write_results

from mmv1.kernels import fused, plain
from mmv1.kernels.sampling import gumbel_argmax
from mmv1.runner.platform import Platform
from mmv1.runner.sampler import Sampler

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 3584, 18944, 28, 4, 128, 152064
VISION_HIDDEN, VISION_INTERMEDIATE, VISION_HEADS, VISION_HEAD_DIM, PATCH, PADDED_PATCH = 1280, 3456, 16, 80, 588, 592
PLACES = 2304  # that Qwen3-VL's towers have learned
BLOCK_SIZE = 16
EPS = 1e-6


class Case(NamedTuple):
    name: str
    moved: int  # bytes read and written
    plain: Callable[[], Any]
    fused: Callable[[], Any]


def of(name: str, moved: int, *args: Any) -> Case:
    return Case(name, moved, lambda: getattr(plain, name)(*args), lambda: getattr(fused, name)(*args))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def text_cases(tokens: int) -> Iterator[Case]:
    row, weight, x = HIDDEN * 2, random(HIDDEN), random(tokens, HIDDEN)
    yield of("rms_norm", 2 * tokens * row, x, weight, EPS)
    yield of("add_rms_norm", 4 * tokens * row, x, random(tokens, HIDDEN), weight, EPS)
    if tokens <= 16:
        parts = random(7, tokens, HIDDEN, dtype=torch.float32)
        case = of("add_rms_norm", (3 + 14) * tokens * row, parts, random(tokens, HIDDEN), weight, EPS)
        yield case._replace(name="add_rms_norm, 7 parts")
    yield of("silu_and_mul", 3 * tokens * INTERMEDIATE * 2, random(tokens, 2 * INTERMEDIATE))
    qkv = random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
    cos, sin = random(tokens, HEAD_DIM // 2), random(tokens, HEAD_DIM // 2)
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens].int()
    cache = random(2, -(-2 * tokens // BLOCK_SIZE), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    yield of("rotate_and_store", tokens * (2 * HEADS + 5 * KV_HEADS) * HEAD_DIM * 2, qkv, KV_HEADS, cos, sin, slots, cache)
    ids = torch.randint(0, VOCAB, (tokens,), device="cuda", dtype=torch.int32)
    rows = torch.where(ids % 2 == 0, -1, ids % tokens)
    yield of("embed", 2 * tokens * row, ids, random(VOCAB, HIDDEN), rows, random(tokens, HIDDEN))


def sampling_cases(requests: int) -> Iterator[Case]:
    logits, sampler = random(requests, VOCAB), Sampler(Platform(), VOCAB)
    temperature = torch.rand(requests, device="cuda") + 0.1
    keys = torch.randint(-(1 << 62), 1 << 62, (requests,), device="cuda")
    yield Case(
        f"gumbel_argmax, {requests} rows",
        logits.nbytes,
        lambda: (logits.float() / temperature.unsqueeze(1) - sampler._log_exponential(keys)).argmax(dim=-1),
        lambda: gumbel_argmax(logits, temperature, keys),
    )


def vision_cases(patches: int) -> Iterator[Case]:
    x, weight = random(patches, VISION_HIDDEN), random(VISION_HIDDEN)
    yield of("rms_norm", 2 * x.nbytes, x, weight, EPS)
    yield of("add_rms_norm", 4 * x.nbytes, x, random(patches, VISION_HIDDEN), weight, EPS)
    yield of("layer_norm", 2 * x.nbytes, x, weight, weight, EPS)
    yield of("add_layer_norm", 4 * x.nbytes, x, random(patches, VISION_HIDDEN), weight, weight, EPS)
    yield of("silu_and_mul", 3 * patches * VISION_INTERMEDIATE * 2, random(patches, 2 * VISION_INTERMEDIATE))
    yield of("quick_gelu", 2 * patches * VISION_INTERMEDIATE * 2, random(patches, VISION_INTERMEDIATE))
    taps = torch.randint(0, PLACES, (patches, 4), device="cuda")
    yield of("add_interpolated", 2 * x.nbytes, x, random(PLACES, VISION_HIDDEN), taps, random(patches, 4, dtype=torch.float32))
    rotated = random(patches, 3 * VISION_HEADS, VISION_HEAD_DIM)[:, : 2 * VISION_HEADS]
    angles = random(patches, VISION_HEAD_DIM // 2, dtype=torch.float32)
    yield of("rotate_", 2 * patches * 2 * VISION_HEADS * VISION_HEAD_DIM * 2, rotated, angles.cos(), angles.sin())
    pixels = torch.randint(0, 256, (patches, PATCH), dtype=torch.uint8, device="cuda")
    order = torch.randperm(patches // 4, device="cuda")
    mean, std = torch.full((3,), 120.0, device="cuda"), torch.full((3,), 68.0, device="cuda")
    moved = patches * (PATCH + 2 * PADDED_PATCH)
    yield of("normalize_patches", moved, pixels, order, 4, mean, std, PADDED_PATCH, torch.bfloat16)


def measure(cases: Iterator[Case], rows: int) -> Iterator[dict[str, Any]]:
    for case in cases:
        repeats = max(2, min(50, (1 << 31) // case.moved))
        plain_s, fused_s = seconds_per_call([case.plain], repeats), seconds_per_call([case.fused], repeats)
        print(f"{case.name:24} {rows:6}  plain {plain_s * 1e3:8.4f} ms {case.moved / plain_s / 1e9:6.0f} GB/s   "
              f"fused {fused_s * 1e3:8.4f} ms {case.moved / fused_s / 1e9:6.0f} GB/s", flush=True)
        yield {"operation": case.name, "rows": rows, "plain_ms": plain_s * 1e3, "fused_ms": fused_s * 1e3, "bytes": case.moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 8192])
    parser.add_argument("--patches", nargs="+", type=int, default=[21904])
    parser.add_argument("--out", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    rows = [row for tokens in args.tokens for row in measure(text_cases(tokens), tokens)]
    rows += [row for requests in (1, 64) for row in measure(sampling_cases(requests), requests)]
    rows += [row for patches in args.patches for row in measure(vision_cases(patches), patches)]
    if args.out:
        write_results(args.out, rows)


if __name__ == "__main__":
    main()
