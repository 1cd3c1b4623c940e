"""A mixture of experts: who computes a token, and the products of each expert with the tokens that chose it.

Two kernels of products, one after the other, and a sum. A program takes a block of rows that chose the same expert, gathered from
wherever they are, and some of the expert's outputs; the weight, all there is to read in a step of few tokens, is read once a
block. Which rows those are is worked out on the device, and the number of tokens alone decides the grids: there are programs for
as many blocks as there can be, and those that find no work end. So all of it can be recorded.

A token's result depends on its own numbers and on the tile that the number of tokens chooses: not on other tokens, on where among
them it stands, or on which program is first. Its experts' products are added up in the order of `expert_ids`, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows

_SORT_CHUNK = 2048  # assignments a program looks at at a time
_SUM_BLOCK = 1024


class ExpertsTiles(NamedTuple):
    block_m: int  # rows of a block
    gate_n: int  # outputs of gate, and as many of up, in a program; at least 32: see `flash_tile.padded_head_dim`
    down_n: int  # outputs of down in a program
    block_k: int  # columns in one step of its loop
    group_m: int  # blocks that take turns at the same outputs, while those parts of a weight are in the L2 cache
    num_warps: int
    num_stages: int  # of the pipeline of loads


def experts_tiles(num_tokens: int, dtype: torch.dtype) -> ExpertsTiles:
    """By the number of tokens alone, so that recorded steps and one of the whole budget meet every tile before requests come.
    Reckoned for an H100. On an H200, at Qwen3-30B-A3B's shapes (benchmarks/moe.py), 1.5 to 3 times as fast as torch's grouped
    products at every size; up to 512 tokens all there is to do is to read the weights, at 4,096 half of the products' rate."""
    if dtype == torch.float32:
        return ExpertsTiles(16, 32, 32, 32, 1, 4, 2)
    if num_tokens <= 64:
        return ExpertsTiles(16, 32, 64, 128, 1, 4, 5)
    if num_tokens <= 512:
        return ExpertsTiles(64, 64, 128, 64, 4, 4, 4)
    return ExpertsTiles(128, 128, 256, 64, 8, 8, 3)


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `plain.route`; of experts that are equally likely the lowest id comes first."""
    check_rows(logits)
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, top_k), dtype=logits.dtype, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    _route_kernel[(num_tokens,)](
        logits, weights, ids, logits.stride(0), num_experts, top_k, renormalize,
        triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip
    return weights, ids


@triton.jit
def _route_kernel(
    logits, weights, ids, stride, num_experts: tl.constexpr, top_k: tl.constexpr, renormalize: tl.constexpr,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, BLOCK), tl.arange(0, TOP_K)
    logit = tl.load(logits + token * stride + expert, mask=expert < num_experts, other=float("-inf")).to(tl.float32)
    likely = tl.exp(logit - tl.max(logit, axis=0))
    likely = tl.div_rn(likely, tl.zeros_like(likely) + tl.sum(likely, axis=0))
    # NaN is the largest, as for torch: there are always `top_k` experts to be found, all different.
    likely = tl.where(likely != likely, float("inf"), likely)
    likely = tl.where(expert < num_experts, likely, float("-inf"))
    chosen = tl.zeros((TOP_K,), dtype=tl.float32)
    chosen_ids = tl.zeros((TOP_K,), dtype=tl.int32)
    for turn in tl.static_range(top_k):
        best, best_id = tl.max(likely, axis=0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(place == turn, best, chosen)
        chosen_ids = tl.where(place == turn, best_id, chosen_ids)
        likely = tl.where(expert == best_id, float("-inf"), likely)
    if renormalize:
        chosen = tl.div_rn(chosen, tl.zeros_like(chosen) + tl.sum(chosen, axis=0))
    tl.store(weights + token * top_k + place, chosen.to(weights.dtype.element_ty), mask=place < top_k)
    tl.store(ids + token * top_k + place, chosen_ids, mask=place < top_k)


def experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_weights: torch.Tensor, expert_ids: torch.Tensor
) -> torch.Tensor:
    """As `plain.experts`, without waiting for the device, and rounded less often: what down gives is weighted before it is
    rounded, and added up in float32."""
    return tiled_experts(x, gate_up, down, expert_weights, expert_ids, experts_tiles(x.shape[0], x.dtype))


def tiled_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsTiles,
) -> torch.Tensor:
    """`experts` in tiles of one's choice."""
    check_rows(x, gate_up, down)
    (num_tokens, top_k), (num_experts, hidden, width) = expert_ids.shape, down.shape
    expert_weights, expert_ids = expert_weights.contiguous(), expert_ids.contiguous()
    num_rows, few = num_tokens * top_k, num_tokens <= config.block_m
    if few:
        num_blocks, blocks, rows, group_m = num_rows, expert_ids, expert_ids, 1
    else:
        blocks, rows = _sort_by_expert(expert_ids, num_experts, config)
        num_blocks, group_m = len(blocks), config.group_m
    gated = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    products = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    out = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device)
    of_blocks = (top_k, triton.next_power_of_2(top_k), few, config.block_m)
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    _gate_up_kernel[(num_blocks * triton.cdiv(width, config.gate_n),)](
        x, gate_up, blocks, rows, gated, num_tokens, x.stride(0), gate_up.stride(0), gate_up.stride(1), hidden, width,
        *of_blocks, config.gate_n, config.block_k, group_m, **launch,
    )  # fmt: skip
    _down_kernel[(num_blocks * triton.cdiv(hidden, config.down_n),)](
        gated, down, expert_weights, blocks, rows, products, num_tokens, down.stride(0), down.stride(1), hidden, width,
        *of_blocks, config.down_n, config.block_k, group_m, **launch,
    )  # fmt: skip
    _sum_kernel[(num_tokens, triton.cdiv(hidden, _SUM_BLOCK))](products, out, hidden, top_k, _SUM_BLOCK, num_warps=4)
    return out


def _sort_by_expert(expert_ids: torch.Tensor, num_experts: int, config: ExpertsTiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Every choice of an expert by a token (its number: token * k + which of its choices) in blocks of one expert each.

    Returns of as many blocks as there can be the expert, int32 [blocks], -1 where there is no such block, and the rows, int32
    [blocks, block_m]: choices in their order, then -1."""
    num_choices, block_m = expert_ids.numel(), config.block_m
    most = (num_choices + min(num_experts, num_choices) * (block_m - 1)) // block_m  # each expert, at worst, for one row
    num_blocks = triton.cdiv(most, config.group_m) * config.group_m
    counts, blocks, rows = (
        torch.empty(shape, dtype=torch.int32, device=expert_ids.device)
        for shape in ((num_experts,), (num_blocks,), (num_blocks, block_m))
    )
    _count_kernel[(num_experts,)](expert_ids, counts, num_choices, _SORT_CHUNK, num_warps=8)
    _sort_kernel[(num_experts,)](
        expert_ids, counts, blocks, rows, num_choices, num_blocks, num_experts, triton.next_power_of_2(num_experts), block_m,
        _SORT_CHUNK, num_warps=8,
    )  # fmt: skip
    return blocks, rows


@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(expert_ids, counts, num_choices, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    choice = tl.arange(0, CHUNK)
    count = tl.zeros((CHUNK,), dtype=tl.int32)
    start = 0
    while start < num_choices:
        count += (tl.load(expert_ids + start + choice, mask=start + choice < num_choices, other=-1) == expert).to(tl.int32)
        start += CHUNK
    tl.store(counts + expert, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_choices", "num_blocks"])
def _sort_kernel(
    expert_ids, counts, blocks, rows, num_choices, num_blocks,
    num_experts: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program writes the blocks of its expert, and the last one those that are not used."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    needed = tl.cdiv(tl.load(counts + every, mask=every < num_experts, other=0), BLOCK_M)
    first = tl.sum(tl.where(every < expert, needed, 0), axis=0)
    end = first + tl.sum(tl.where(every == expert, needed, 0), axis=0)
    block = first
    while block < end:
        tl.store(blocks + block, expert)
        block += 1
    if expert == num_experts - 1:
        while block < num_blocks:
            tl.store(blocks + block, -1)
            block += 1
    choice = tl.arange(0, CHUNK)
    place = first * BLOCK_M
    start = 0
    while start < num_choices:
        chosen = (tl.load(expert_ids + start + choice, mask=start + choice < num_choices, other=-1) == expert).to(tl.int32)
        tl.store(rows + place + tl.cumsum(chosen, axis=0) - 1, start + choice, mask=chosen == 1)
        place += tl.sum(chosen, axis=0)
        start += CHUNK
    rest = place + tl.arange(0, BLOCK_M)
    tl.store(rows + rest, -1, mask=rest < end * BLOCK_M)


@triton.jit
def _find_block(
    blocks, rows, block, num_tokens, top_k: tl.constexpr, TOP_K: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The expert of a block, -1 if there is nothing to do, and the choices [BLOCK_M] that are its rows, -1 where there is none.

    FEW: no more tokens than a block has rows, so an expert needs one block at most, whose rows are the tokens as they come. There
    is a block for every choice, and the first choice of an expert does the work for all; `blocks` and `rows` are the choices."""
    row = tl.arange(0, BLOCK_M)
    expert = tl.load(blocks + block)
    if FEW:
        slot = tl.arange(0, TOP_K)
        choice = row[:, None] * top_k + slot[None, :]
        is_choice = (row < num_tokens)[:, None] & (slot < top_k)[None, :]
        chosen = tl.load(rows + choice, mask=is_choice, other=-1)
        found = tl.max(tl.where(chosen == expert, choice, -1), axis=1)
        leader = tl.min(tl.where(found < 0, num_tokens * top_k, found), axis=0)
        expert = tl.where(leader == block, expert, -1)
    else:
        found = tl.load(rows + block * BLOCK_M + row, mask=expert >= 0, other=-1)
    return expert, found


@triton.jit
def _place(program, num_parts: tl.constexpr, GROUP_M: tl.constexpr):
    """A program's block and its part of the outputs: GROUP_M blocks have their first part, then their second."""
    inside = program % (GROUP_M * num_parts)
    return program // (GROUP_M * num_parts) * GROUP_M + inside % GROUP_M, inside // GROUP_M


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x, gate_up, blocks, rows, out, num_tokens, x_stride, expert_stride, row_stride, hidden: tl.constexpr, width: tl.constexpr,
    top_k: tl.constexpr, TOP_K: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """silu(gate(x)) * up(x) of a block's rows."""
    dtype = out.dtype.element_ty
    block, part = _place(tl.program_id(0), tl.cdiv(width, BLOCK_N), GROUP_M)
    expert, choice = _find_block(blocks, rows, block, num_tokens, top_k, TOP_K, FEW, BLOCK_M)
    if expert < 0:
        return
    is_row = choice >= 0
    output = part * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < width
    column = tl.arange(0, BLOCK_K)
    policy: tl.constexpr = "evict_first" if FEW else ""  # read once: what programs share, the tokens, should stay in the cache
    x_place = x + (choice // top_k).to(tl.int64)[:, None] * x_stride + column[None, :]
    gate_place = gate_up + expert.to(tl.int64) * expert_stride + output[None, :] * row_stride + column[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_K):
        is_column = start + column < hidden
        is_weight = is_column[:, None] & is_output[None, :]
        tokens = tl.load(x_place + start, mask=is_row[:, None] & is_column[None, :], other=0.0)
        gate_weight = tl.load(gate_place + start, mask=is_weight, other=0.0, eviction_policy=policy)
        up_weight = tl.load(gate_place + width * row_stride + start, mask=is_weight, other=0.0, eviction_policy=policy)
        gate = tl.dot(tokens, gate_weight, gate, input_precision="ieee")
        up = tl.dot(tokens, up_weight, up, input_precision="ieee")
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    place = out + choice.to(tl.int64)[:, None] * width + output[None, :]
    tl.store(place, (activated * up).to(dtype), mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _down_kernel(
    gated, down, weights, blocks, rows, out, num_tokens, expert_stride, row_stride, hidden: tl.constexpr, width: tl.constexpr,
    top_k: tl.constexpr, TOP_K: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """down of a block's rows, times their weights."""
    block, part = _place(tl.program_id(0), tl.cdiv(hidden, BLOCK_N), GROUP_M)
    expert, choice = _find_block(blocks, rows, block, num_tokens, top_k, TOP_K, FEW, BLOCK_M)
    if expert < 0:
        return
    is_row = choice >= 0
    output = part * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < hidden
    column = tl.arange(0, BLOCK_K)
    policy: tl.constexpr = "evict_first" if FEW else ""
    gated_place = gated + choice.to(tl.int64)[:, None] * width + column[None, :]
    down_place = down + expert.to(tl.int64) * expert_stride + output[None, :] * row_stride + column[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        is_column = start + column < width
        tokens = tl.load(gated_place + start, mask=is_row[:, None] & is_column[None, :], other=0.0)
        is_weight = is_column[:, None] & is_output[None, :]
        weight = tl.load(down_place + start, mask=is_weight, other=0.0, eviction_policy=policy)
        sums = tl.dot(tokens, weight, sums, input_precision="ieee")
    sums *= tl.load(weights + choice, mask=is_row, other=0.0).to(tl.float32)[:, None]
    place = out + choice.to(tl.int64)[:, None] * hidden + output[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit
def _sum_kernel(products, out, hidden: tl.constexpr, top_k: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    place = products + token * top_k * hidden + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(top_k):
        total += tl.load(place + choice * hidden, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)
