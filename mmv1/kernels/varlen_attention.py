"""Attention inside segments of a packed sequence, every token of a segment to every other (vision towers).

Segments of at most 64 tokens, Qwen2.5-VL's windows, take one program per segment and head: all keys are in one tile and the
softmax needs no second look. Longer ones are cut in tiles of queries that go over their segment's keys (FlashAttention-2, Dao,
2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from mmv1.kernels.flash_tile import LOG2_E, load_rows, online_softmax, padded_head_dim, store_rows

MAX_WINDOW = 64
_BLOCK_M, _BLOCK_N = 128, 64


@triton.jit(do_not_specialize=["segments_stride"], do_not_specialize_on_alignment=["segments"])
def _window_kernel(
    query, key, value, output, segments, scale, segments_stride,
    query_stride, key_stride, value_stride, output_stride,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, segment = tl.program_id(0), tl.program_id(1)
    start = tl.load(segments + segment)
    length = tl.load(segments + segments_stride + segment)
    rows = tl.arange(0, BLOCK)
    inside = rows < length
    token = (start + rows).to(tl.int64)
    query_offsets = token * query_stride + head * HEAD_DIM
    key_offsets = token * key_stride + head * HEAD_DIM
    value_offsets = token * value_stride + head * HEAD_DIM
    q = load_rows(query, query_offsets, inside, DIM, HEAD_DIM, True)
    k = load_rows(key, key_offsets, inside, DIM, HEAD_DIM, True)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    scores = tl.where(inside[None, :], scores * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)
    weights = weights.to(value.dtype.element_ty)
    offsets = token * output_stride + head * HEAD_DIM
    v = load_rows(value, value_offsets, inside, DIM, HEAD_DIM, True)
    attended = tl.dot(weights, v, input_precision="tf32x3") / total[:, None]
    store_rows(output, offsets, attended, inside, DIM, HEAD_DIM)
@triton.jit
def _attend_keys(
    query, acc, maximum, total, start, stop, keys_base, values_base, key_stride, value_stride, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on over the keys [start, stop). Unless MASKED, they are a multiple of BLOCK_N."""
    for first in range(start, stop, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        inside = places < stop
        key_offsets = places.to(tl.int64) * key_stride
        keys = load_rows(keys_base, key_offsets, inside, DIM, HEAD_DIM, MASKED)
        scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
        scores *= scale
        if MASKED:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        weights, correction, maximum, total = online_softmax(scores, maximum, total)
        value_offsets = places.to(tl.int64) * value_stride
        values = load_rows(values_base, value_offsets, inside, DIM, HEAD_DIM, MASKED)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * correction[:, None], input_precision="tf32x3")
    return acc, maximum, total


@triton.jit(do_not_specialize=["segments_stride"], do_not_specialize_on_alignment=["segments"])
def _segment_kernel(
    query, key, value, output, segments, scale, segments_stride,
    query_stride, key_stride, value_stride, output_stride,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    start = tl.load(segments + tile)
    stop = start + tl.load(segments + segments_stride + tile)
    rows = tl.load(segments + 2 * segments_stride + tile) + tl.arange(0, BLOCK_M)
    valid = rows < stop
    token = rows.to(tl.int64)
    query_offsets = token * query_stride + head * HEAD_DIM
    q = load_rows(query, query_offsets, valid, DIM, HEAD_DIM, True)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    keys_base = key + head * HEAD_DIM
    values_base = value + head * HEAD_DIM
    border = start + (stop - start) // BLOCK_N * BLOCK_N
    acc, maximum, total = _attend_keys(
        q, acc, maximum, total, start, border, keys_base, values_base, key_stride, value_stride, scale,
        HEAD_DIM, DIM, BLOCK_N, False,
    )  # fmt: skip
    acc, maximum, total = _attend_keys(
        q, acc, maximum, total, border, stop, keys_base, values_base, key_stride, value_stride, scale,
        HEAD_DIM, DIM, BLOCK_N, True,
    )  # fmt: skip
    offsets = token * output_stride + head * HEAD_DIM
    store_rows(output, offsets, acc / total[:, None], valid, DIM, HEAD_DIM)
def make_segments(seqlens: Sequence[int], longest: int, num_segments: int | None = None) -> np.ndarray:
    """int32 [2, n] for segments of at most `longest` <= MAX_WINDOW tokens: first token, length. Else int32 [3, tiles]: first
    token and length of the segment, and the tile's first query. `num_segments`: with room for as many, and for `longest` tokens
    in all; the rest has no tokens."""
    lengths = np.asarray(seqlens, dtype=np.int32)
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    if longest <= MAX_WINDOW:
        return _padded(np.stack([starts, lengths]), num_segments)
    counts = -(-lengths // _BLOCK_M)
    segment = np.repeat(np.arange(len(lengths)), counts)
    tile = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    tiles = np.stack([starts[segment], lengths[segment], starts[segment] + tile * _BLOCK_M]).astype(np.int32)
    return _padded(tiles, None if num_segments is None else num_segments + longest // _BLOCK_M)


def _padded(columns: np.ndarray, count: int | None) -> np.ndarray:
    return columns if count is None else np.pad(columns, ((0, 0), (0, count - columns.shape[1])))


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scale: float
) -> torch.Tensor:
    """query, key, value: [N, H, D], the heads of a token side by side, tokens any distance apart. segments: `make_segments` of
    their lengths, on the device. Returns [N, H, D], contiguous. Raises ValueError for heads that lie apart."""
    _, num_heads, head_dim = query.shape
    if any(x.stride()[1:] != (head_dim, 1) for x in (query, key, value)):
        raise ValueError("varlen_attention: the heads of a token must lie side by side")
    output = query.new_empty(query.shape)
    strides = [x.stride(0) for x in (query, key, value, output)]
    padded = padded_head_dim(head_dim)
    is_wide = query.element_size() > 2
    arguments = (query, key, value, output, segments, scale * LOG2_E, segments.stride(0), *strides)
    grid = (num_heads, segments.shape[1])
    if segments.shape[0] == 2:
        _window_kernel[grid](*arguments, head_dim, padded, MAX_WINDOW, num_warps=4)
    else:
        block_n, num_stages = (32, 2) if is_wide else (_BLOCK_N, 3)
        _segment_kernel[grid](*arguments, head_dim, padded, _BLOCK_M, block_n, num_warps=8, num_stages=num_stages)
    return output
