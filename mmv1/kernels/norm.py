"""Normalisation of rows, alone and after the addition to the residual stream: by their root mean square, or of their mean and
deviation. One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    check_rows(x, weight)
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](x, weight, out, x.stride(0), eps, width, block, num_warps=_num_warps(block))
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rows(x, residual, weight)
    num_tokens, width = residual.shape
    parts = x if x.dim() == 3 else x.unsqueeze(0)
    normed, total = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    block = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(num_tokens,)](
        parts, residual, weight, normed, total, parts.stride(0), parts.stride(1), residual.stride(0), eps,
        parts.shape[0], width, block, num_warps=_num_warps(block),
    )  # fmt: skip
    return normed, total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    check_rows(x, weight, bias)
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _layer_norm_kernel[(num_rows,)](x, weight, bias, out, x.stride(0), eps, width, block, num_warps=_num_warps(block))
    return out


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rows(x, residual, weight, bias)
    num_tokens, width = residual.shape
    parts = x if x.dim() == 3 else x.unsqueeze(0)
    normed, total = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    block = triton.next_power_of_2(width)
    _add_layer_norm_kernel[(num_tokens,)](
        parts, residual, weight, bias, normed, total, parts.stride(0), parts.stride(1), residual.stride(0), eps,
        parts.shape[0], width, block, num_warps=_num_warps(block),
    )  # fmt: skip
    return normed, total


def _num_warps(block: int) -> int:
    """16 bytes of bfloat16 to a thread, in 1 to 16 warps."""
    return min(max(block // 256, 1), 16)


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values) / width + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (normed * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_parts(place, residual_place, inside, part_stride, num_parts: tl.constexpr, dtype: tl.constexpr):
    """A row of the residual stream and the sum of the parts of what is added to it, each rounded to `dtype`."""
    added = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, num_parts):
        added += tl.load(place + part * part_stride.to(tl.int64), mask=inside, other=0.0).to(tl.float32)
    values = tl.load(residual_place, mask=inside, other=0.0).to(tl.float32)
    return (values + added.to(dtype).to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["part_stride"])
def _add_rms_norm_kernel(
    parts, residual, weight, normed_out, total_out, part_stride, x_stride, residual_stride, eps,
    num_parts: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = total_out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place, residual_place = parts + row * x_stride + columns, residual + row * residual_stride + columns
    total = _add_parts(place, residual_place, inside, part_stride, num_parts, dtype)
    tl.store(total_out + row * width + columns, total, mask=inside)
    total = total.to(tl.float32)
    normed = total * tl.rsqrt(tl.sum(total * total) / width + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(dtype).to(tl.float32) * scale
    tl.store(normed_out + row * width + columns, normed.to(dtype), mask=inside)


@triton.jit
def _layer_normed(values, weight, bias, columns, inside, eps, width: tl.constexpr):
    """float32, of float32 `values` that are 0 where they are not inside."""
    centered = tl.where(inside, values - tl.sum(values) / width, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered) / width + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return normed * scale + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _layer_norm_kernel(x, weight, bias, out, x_stride, eps, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    normed = _layer_normed(values, weight, bias, columns, inside, eps, width)
    tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["part_stride"])
def _add_layer_norm_kernel(
    parts, residual, weight, bias, normed_out, total_out, part_stride, x_stride, residual_stride, eps,
    num_parts: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = total_out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place, residual_place = parts + row * x_stride + columns, residual + row * residual_stride + columns
    total = _add_parts(place, residual_place, inside, part_stride, num_parts, dtype)
    tl.store(total_out + row * width + columns, total, mask=inside)
    normed = _layer_normed(total.to(tl.float32), weight, bias, columns, inside, eps, width)
    tl.store(normed_out + row * width + columns, normed.to(dtype), mask=inside)
