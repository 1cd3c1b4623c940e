"""The gate of a SwiGLU layer, and an activation of vision towers. One program a part of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows

_BLOCK = 1024


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    check_rows(x)
    num_tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](x, out, x.stride(0), width, _BLOCK, num_warps=4)
    return out


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    check_rows(x)
    num_tokens, width = x.shape
    out = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    _quick_gelu_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](x, out, x.stride(0), width, _BLOCK, num_warps=4)
    return out


@triton.jit
def _silu_and_mul_kernel(x, out, x_stride, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = x + row * x_stride + columns
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (activated * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quick_gelu_kernel(x, out, x_stride, width: tl.constexpr, BLOCK: tl.constexpr):
    dtype = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = (1.702 * values).to(dtype).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-scaled))).to(dtype).to(tl.float32)
    tl.store(out + row * width + columns, (values * gate).to(dtype), mask=inside)
