"""Causal attention over the paged KV cache: FlashAttention-2's loop (Dao, 2023) over the blocks of a block table
(PagedAttention, Kwon et al., 2023), with the keys of a long request split over programs (Flash-Decoding, Dao et al., 2023).

One kernel for decodes, chunks and whole prompts. Its work comes in tiles: some tokens of one request. A program takes a tile, the
query heads of one key head (or one of them, when the tile is large) and one split of the keys. All lengths are read from the
device, and the grid depends on the number of tiles alone, so a launch recorded in a CUDA graph serves whatever comes later.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmv1.kernels.flash_tile import LOG2_E, load_rows, online_softmax, padded_head_dim, store_rows

_MAX_ROWS = 128  # query rows of a program


class TileConfig(NamedTuple):
    """How the kernel is compiled: keys in a step of its loop, warps, and stages of its pipeline. A key is found through the block
    table, a load behind a load: of the stages, every other one is a step of keys under way."""

    block_n: int
    num_warps: int
    num_stages: int


def choose_config(rows: int, itemsize: int) -> TileConfig:
    """For programs of so many query rows; `itemsize` in bytes, of the cache. Small ones as measured on an H200
    (benchmarks/results/h200_attention.json): an SM has room for many programs of one warp and few keys, which pays where there
    are more than two waves of larger ones; with fewer, four or eight warps and 64 keys are up to 9 % faster."""
    if itemsize > 2:  # float32: tiles of twice the bytes
        return TileConfig(32, 4 if rows <= 64 else 8, 2)
    if rows <= 16:
        return TileConfig(32, 1, 5)
    return TileConfig(64, 4, 3) if rows <= 64 else TileConfig(64, 8, 3)


@triton.jit
def _keys_per_split(seq_len, num_splits, BLOCK_N: tl.constexpr):
    return tl.cdiv(tl.cdiv(seq_len, BLOCK_N), num_splits) * BLOCK_N


@triton.jit
def _attend_keys(
    query, index, acc, maximum, total, start, stop, keys_base, values_base, table, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on over the keys [start, stop). Unless MASKED, every row sees all of them and they are a multiple of BLOCK_N."""
    for first in range(start, stop, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        inside = places < stop
        if MASKED:
            block = tl.load(table + places // BLOCK_SIZE, mask=inside, other=0)
        else:
            block = tl.load(table + places // BLOCK_SIZE)
        slots = block.to(tl.int64) * BLOCK_SIZE + places % BLOCK_SIZE
        offsets = slots * (NUM_KV_HEADS * HEAD_DIM)
        keys = load_rows(keys_base, offsets, inside, DIM, HEAD_DIM, MASKED)
        scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
        scores *= scale
        if MASKED:
            scores = tl.where(places[None, :] <= index[:, None], scores, float("-inf"))
        weights, correction, maximum, total = online_softmax(scores, maximum, total)
        values = load_rows(values_base, offsets, inside, DIM, HEAD_DIM, MASKED)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * correction[:, None], input_precision="tf32x3")
    return acc, maximum, total


@triton.jit(do_not_specialize=["num_splits", "tiles_stride"], do_not_specialize_on_alignment=["tiles", "block_table"])
def _attention_kernel(
    query, key_cache, value_cache, tiles, block_table, output, lse, scale, num_splits, tiles_stride, table_stride, query_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """HEADS query heads of one key head for one tile and one split. Rows are token by token, the heads of a token together. If
    split, `output` is float32 [T, H, splits, D], each part normalised by itself, and `lse` its log2 of the sum of weights."""
    part, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_tokens = tl.load(tiles + 2 * tiles_stride + tile)
    if num_tokens == 0:
        return
    row = tl.load(tiles + tile)
    first_token = tl.load(tiles + tiles_stride + tile)
    first_index = tl.load(tiles + 3 * tiles_stride + tile)
    seq_len = first_index + num_tokens  # what the tile's last token sees
    length = _keys_per_split(seq_len, num_splits, BLOCK_N)
    start = split * length
    if start >= seq_len:
        return
    stop = tl.minimum(start + length, seq_len)

    rows = tl.arange(0, BLOCK_M)
    token = rows // HEADS
    valid = token < num_tokens
    index = first_index + token
    token = (first_token + token).to(tl.int64)
    head = part * HEADS + rows % HEADS
    kv_head = part * HEADS // (NUM_HEADS // NUM_KV_HEADS)
    offsets = token * query_stride + head * HEAD_DIM
    q = load_rows(query, offsets, valid, DIM, HEAD_DIM, True)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    keys_base = key_cache + kv_head * HEAD_DIM
    values_base = value_cache + kv_head * HEAD_DIM
    table = block_table + row.to(tl.int64) * table_stride
    # Whole steps of keys that the tile's first token sees need no mask. Masks cost a small tile nothing, a second loop does.
    if BLOCK_M > 16:
        border = tl.maximum(start, tl.minimum(stop, first_index + 1) // BLOCK_N * BLOCK_N)
        acc, maximum, total = _attend_keys(
            q, index, acc, maximum, total, start, border, keys_base, values_base, table, scale,
            NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, False,
        )  # fmt: skip
        start = border
    acc, maximum, total = _attend_keys(
        q, index, acc, maximum, total, start, stop, keys_base, values_base, table, scale,
        NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, True,
    )  # fmt: skip

    seen = total > 0.0  # the keys of a split may all come after a token
    total = tl.where(seen, total, 1.0)
    place = (token * NUM_HEADS + head) * num_splits + split
    store_rows(output, place * HEAD_DIM, acc / total[:, None], valid, DIM, HEAD_DIM)
    if IS_SPLIT:
        tl.store(lse + place, tl.where(seen, maximum + tl.log2(total), float("-inf")), mask=valid)


@triton.jit(do_not_specialize=["num_splits", "tiles_stride"], do_not_specialize_on_alignment=["tiles"])
def _combine_kernel(
    partial, lse, tiles, output, num_splits, tiles_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits of one head of a tile's tokens, weighted by their sums. Splits beyond the keys were not written: not read."""
    head, tile = tl.program_id(0), tl.program_id(1)
    num_tokens = tl.load(tiles + 2 * tiles_stride + tile)
    first_token = tl.load(tiles + tiles_stride + tile).to(tl.int64)
    seq_len = tl.load(tiles + 3 * tiles_stride + tile) + num_tokens
    splits = tl.arange(0, PADDED_SPLITS)
    written = (splits < num_splits) & (splits * _keys_per_split(seq_len, num_splits, BLOCK_N) < seq_len)
    dims = tl.arange(0, PADDED_DIM)
    for i in range(num_tokens):
        place = (first_token + i) * NUM_HEADS + head
        part_lse = tl.load(lse + place * num_splits + splits, mask=written, other=float("-inf"))
        weights = tl.exp2(part_lse - tl.max(part_lse, 0))  # the first split holds key 0, which every token sees
        offsets = (place * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
        parts = tl.load(partial + offsets, mask=written[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        combined = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
        tl.store(output + place * HEAD_DIM + dims, combined.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    tiles: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    block_size: int,
    tokens_per_tile: int,
    num_splits: int = 1,
    output: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Attention of the tokens in `tiles`, each over its own request's keys up to its own place. Returns [T, H, D]; tokens in no
    tile are left as they are in `output` (undefined where none is given).

    query: [T, H, D], a token's heads side by side. kv_cache: [2, num_blocks, block_size, KV, D], contiguous; block_size, a power
    of two, is that of the block table. tiles: int32 [4, n]: row of the block table, first token in `query`, number of tokens
    (0: nothing to do, at most tokens_per_tile), index of the first token in its request. block_table: int32 [rows, blocks].
    num_splits: parts in which each tile's keys are read.
    Raises ValueError for shapes it was not made for.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    if not kv_cache.is_contiguous() or query.stride()[1:] != (head_dim, 1) or not 1 == block_table.stride(1) == tiles.stride(1):
        raise ValueError("paged_attention: a contiguous cache, rows of tables and of tiles, and heads of a token are needed")
    if block_size & (block_size - 1):
        raise ValueError(f"paged_attention: the block size {block_size} is not a power of two")
    group = num_heads // num_kv_heads
    heads = group if tokens_per_tile * group <= _MAX_ROWS else 1
    block_m = max(16, triton.next_power_of_2(tokens_per_tile * heads))
    if block_m > _MAX_ROWS:
        raise ValueError(f"paged_attention: tiles of {tokens_per_tile} tokens are too large, at most {_MAX_ROWS} are possible")
    block_n, num_warps, num_stages = config or choose_config(block_m, kv_cache.element_size())
    if output is None:
        output = query.new_empty(query.shape)
    padded = padded_head_dim(head_dim)
    target, lse = output, output
    if num_splits > 1:
        target = query.new_empty((num_tokens, num_heads, num_splits, head_dim), dtype=torch.float32)
        lse = query.new_empty((num_tokens, num_heads, num_splits), dtype=torch.float32)
    num_tiles = tiles.shape[1]
    _attention_kernel[(num_heads // heads, num_tiles, num_splits)](
        query, kv_cache[0], kv_cache[1], tiles, block_table, target, lse, scale * LOG2_E, num_splits,
        tiles.stride(0), block_table.stride(0), query.stride(0),
        num_heads, num_kv_heads, head_dim, padded, heads, block_size, block_m, block_n, num_splits > 1,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if num_splits > 1:
        # Two sizes only: nothing is to be compiled for a number of splits.
        padded_splits = 16 if num_splits <= 16 else triton.next_power_of_2(max(num_splits, 64))
        _combine_kernel[(num_heads, num_tiles)](
            target, lse, tiles, output, num_splits, tiles.stride(0),
            num_heads, head_dim, triton.next_power_of_2(head_dim), block_n, padded_splits, num_warps=4,
        )  # fmt: skip
    return output
