"""Token ids and pictures to vectors. One program a token and part of a row."""

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
