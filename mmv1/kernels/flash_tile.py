"""What the attention kernels share: heads padded to powers of two, rows loaded under a mask, softmax by tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # scores are scaled by it, so that exp2, which the hardware has, stands for exp


def padded_head_dim(head_dim: int) -> int:
    """What a head takes in a product: a power of two, at least 32. Two products of sizes that add up, 80 = 64 + 16, would waste
    less, but Triton 3.6 compiles those of 16 columns wrongly for Hopper: they read shared memory that is not theirs."""
    return max(32, triton.next_power_of_2(head_dim))


@triton.jit
def load_rows(base, offsets, inside, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """[rows, DIM]: the head at each offset. Zero beyond the head and, when MASKED, in rows that are not inside: whatever lies in
    memory there, NaN included, is not read."""
    dims = tl.arange(0, DIM)
    pointers = base + offsets[:, None] + dims[None, :]
    if MASKED:
        rows = tl.load(pointers, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif DIM > HEAD_DIM:
        rows = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def store_rows(base, offsets, values, inside, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The reverse of load_rows, rounded to what `base` holds."""
    dims = tl.arange(0, DIM)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] + dims[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax(scores, maximum, total):
    """One more tile of keys (Milakov and Gimelshein, 2018). `scores` [rows, keys] in powers of 2, -inf where a row may not look;
    `maximum` and `total` [rows]: over the tiles before. Returns the tile's weights, the factor for what was summed before,
    and both anew. A row that has seen nothing yet has weights of 0, not NaN."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    return weights, correction, new_maximum, total * correction + tl.sum(weights, 1)
