"""Matrix products of few tokens, where all there is to do is to read the weight once, as fast as memory gives it.

A program keeps BLOCK_N rows of the weight flowing through a pipeline of loads, and multiplies them with all tokens (padded to
the 16 that tensor cores take). Where rows are too few to keep the device busy their width is split too, and the float32 sums of
the parts are added in a fixed order by who comes next: results do not depend on which program was first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows

MAX_SKINNY_TOKENS = 16  # from more on, reading the weight is not all there is to do, and cuBLAS does better
_SUM_BLOCK = 512


class SkinnyConfig(NamedTuple):
    block_n: int  # rows of the weight in a program
    block_k: int  # their columns in one step of its loop
    split_k: int  # programs to a row
    num_warps: int
    num_stages: int  # of the pipeline of loads


def skinny_config(rows: int, *, partial: bool) -> SkinnyConfig:
    """What a weight of so many rows is multiplied with; measured on an H100 (benchmarks/linear.py). `partial`: somebody else adds
    the parts of a split width; where nobody does, splitting costs a kernel more and is not done."""
    if partial:
        return SkinnyConfig(32, 128, 2, 4, 5)
    return SkinnyConfig(16, 256, 1, 2, 4) if rows < 16_384 else SkinnyConfig(32, 256, 1, 4, 4)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not _is_skinny(x, weight):
        return F.linear(x, weight, bias)
    return skinny_linear(x, weight, bias, skinny_config(len(weight), partial=False))


def linear_partial(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not _is_skinny(x, weight):
        return F.linear(x, weight)
    return skinny_partial(x, weight, skinny_config(len(weight), partial=True))


def _is_skinny(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.shape[0] <= MAX_SKINNY_TOKENS and x.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous()


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: SkinnyConfig) -> torch.Tensor:
    """x W^T + b, [T, N], for `x` [T, K] of at most 16 tokens, whose last axis is contiguous."""
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if config.split_k == 1:
        return _launch(x, weight, bias, out, config)
    parts = skinny_partial(x, weight, config)
    num_tokens, rows = out.shape
    _sum_parts_kernel[(num_tokens, triton.cdiv(rows, _SUM_BLOCK))](
        parts, weight if bias is None else bias, out, parts.stride(0), rows, bias is not None, config.split_k, _SUM_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


def skinny_partial(x: torch.Tensor, weight: torch.Tensor, config: SkinnyConfig) -> torch.Tensor:
    """float32 [split_k, T, N], whose sum is x W^T; [T, N] in `x`'s dtype where the width is not split."""
    shape, split = (x.shape[0], weight.shape[0]), config.split_k > 1
    out = torch.empty((config.split_k, *shape) if split else shape, dtype=torch.float32 if split else x.dtype, device=x.device)
    return _launch(x, weight, None, out, config)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: SkinnyConfig
) -> torch.Tensor:
    check_rows(x, weight)
    rows, width = weight.shape
    steps = triton.cdiv(width, config.block_k * config.split_k)  # of each program's loop
    _skinny_kernel[(triton.cdiv(rows, config.block_n), config.split_k)](
        x, weight, weight if bias is None else bias, out, x.shape[0], x.stride(0), rows, width, bias is not None,
        steps, MAX_SKINNY_TOKENS, config.block_n, config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _skinny_kernel(
    x, weight, bias, out, num_tokens, x_stride, rows, width: tl.constexpr, has_bias: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    token = tl.arange(0, BLOCK_T)
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    is_token, is_row = token < num_tokens, first_row + row < rows
    x_place = x + token[:, None] * x_stride + column[None, :]
    weight_place = weight + first_row.to(tl.int64) * width + row[None, :] * width + column[:, None]
    start = split * (STEPS * BLOCK_K)
    sums = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS):
        offset = start + step * BLOCK_K
        is_column = offset + column < width
        # Read once: what other programs read too, the tokens, should stay in the cache.
        w = tl.load(weight_place + offset, mask=is_column[:, None] & is_row[None, :], other=0.0, eviction_policy="evict_first")
        tokens = tl.load(x_place + offset, mask=is_token[:, None] & is_column[None, :], other=0.0)
        sums = tl.dot(tokens, w, sums, input_precision="ieee")
    inside = is_token[:, None] & is_row[None, :]
    place = token[:, None] * rows + first_row + row[None, :]
    if has_bias:
        sums += tl.load(bias + first_row + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    tl.store(out + split * num_tokens * rows + place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["part_stride"])
def _sum_parts_kernel(
    parts, bias, out, part_stride, rows, has_bias: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = tl.program_id(0) * rows + row
    total = tl.load(parts + place, mask=inside, other=0.0)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(parts + part * part_stride + place, mask=inside, other=0.0)
    if has_bias:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
