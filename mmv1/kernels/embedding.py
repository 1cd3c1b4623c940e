"""Token ids and pictures to vectors, and patches to their places. One program a token and part of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows

_BLOCK = 1024


def embed(
    input_ids: torch.Tensor, table: torch.Tensor, image_rows: torch.Tensor, image_embeddings: torch.Tensor
) -> torch.Tensor:
    check_rows(input_ids, table, image_rows, image_embeddings)
    num_tokens, width = input_ids.shape[0], image_embeddings.shape[1]
    out = torch.empty((num_tokens, width), dtype=table.dtype, device=table.device)
    _embed_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
        input_ids, table, image_rows, image_embeddings, out, table.stride(0), image_embeddings.stride(0), table.shape[1], width,
        _BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def add_interpolated(x: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    check_rows(x, table, indices, weights)
    num_patches, width = x.shape
    out = torch.empty((num_patches, width), dtype=x.dtype, device=x.device)
    _add_interpolated_kernel[(num_patches, triton.cdiv(width, _BLOCK))](
        x, table, indices, weights, out, x.stride(0), table.stride(0), indices.stride(0), weights.stride(0), indices.shape[1],
        width, _BLOCK, num_warps=4,
    )  # fmt: skip
    return out


# Ids and rows lie somewhere in a buffer that holds a step's numbers: nothing may be compiled for where.
@triton.jit(do_not_specialize=["input_ids", "image_rows"])
def _embed_kernel(
    input_ids, table, image_rows, image_embeddings, out, table_stride, image_stride,
    table_width: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    image_row = tl.load(image_rows + token).to(tl.int64)
    is_image = image_row >= 0
    input_id = tl.load(input_ids + token).to(tl.int64)
    text = tl.load(table + input_id * table_stride + columns, mask=(columns < table_width) & (image_row < 0), other=0.0)
    image = tl.load(image_embeddings + image_row * image_stride + columns, mask=inside & is_image, other=0.0)
    tl.store(out + token * width + columns, tl.where(is_image, image.to(text.dtype), text), mask=inside)


# Indices and weights lie somewhere in a buffer that holds a batch's numbers.
@triton.jit(do_not_specialize=["indices", "weights"])
def _add_interpolated_kernel(
    x, table, indices, weights, out, x_stride, table_stride, indices_stride, weights_stride,
    num_taps: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = out.dtype.element_ty
    patch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    mean = tl.zeros((BLOCK,), dtype=tl.float32)
    for tap in tl.static_range(num_taps):
        row = tl.load(indices + patch * indices_stride + tap).to(tl.int64)
        weight = tl.load(weights + patch * weights_stride + tap)
        mean += weight * tl.load(table + row * table_stride + columns, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + patch * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + patch * width + columns, (values + mean.to(dtype).to(tl.float32)).to(dtype), mask=inside)
