"""A draw from the softmax of logits, or their largest, in one pass over them and a small reduction.

Gumbel-max: the largest of scores plus Gumbel noise is a sample of their softmax. The noise is a function of the token and of its
stream's key, so nothing is read but the logits: SplitMix64 (Steele, Lea and Flood, 2014), whose top 40 bits are a uniform number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows

_BLOCK = 1024


def gumbel_argmax(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """int64 [S]: a token of each row, the lowest id among equals.

    `logits` [S, V] of any float dtype, last axis contiguous; `temperature` float32 [S], 0: the most likely one, without noise;
    `keys` int64 [S]: where each row's noise begins in the space of all streams.
    """
    check_rows(logits)
    num_rows, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, _BLOCK)
    scores = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    tokens = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
    _draw_parts_kernel[(num_rows, num_parts)](
        logits, temperature, keys, scores, ids, logits.stride(0), vocab_size, num_parts, _BLOCK, num_warps=4
    )
    _choose_part_kernel[(num_rows,)](scores, ids, tokens, num_parts, triton.next_power_of_2(num_parts), num_warps=4)
    return tokens


@triton.jit
def _log_exponential(token, key):
    """Logarithms of exponential variates, which are negated Gumbel noise."""
    z = (token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    uniform = tl.minimum(((z >> 24).to(tl.float32) + 0.5) * (2.0**-40), 1.0 - 2.0**-24)
    # log1p(-uniform), exact to a few units in the last place where 1 - uniform has lost digits (Kahan's way).
    rest = 1.0 - uniform
    log_rest = tl.where(rest == 1.0, -uniform, tl.div_rn(tl.log(rest) * uniform, 1.0 - rest))
    return tl.log(-log_rest)


# Temperatures and keys lie somewhere in a buffer that holds a step's numbers: nothing may be compiled for where.
@triton.jit(do_not_specialize=["temperature", "keys"])
def _draw_parts_kernel(
    logits, temperature, keys, scores, ids, stride, vocab_size: tl.constexpr, num_parts: tl.constexpr, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    score = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    if heat > 0:
        key = tl.load(keys + row).to(tl.uint64, bitcast=True)
        score = tl.div_rn(score, tl.zeros_like(score) + heat) - _log_exponential(token, key)
    # NaN is the largest, as for torch: a token of the vocabulary comes out whatever goes in.
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(inside, score, float("-inf"))
    best, place = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(scores + row * num_parts + part, best)
    tl.store(ids + row * num_parts + part, part * BLOCK + place)


@triton.jit
def _choose_part_kernel(scores, ids, tokens, num_parts: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < num_parts
    score = tl.load(scores + row * num_parts + part, mask=inside, other=float("-inf"))
    place = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(tokens + row, tl.load(ids + row * num_parts + place).to(tl.int64))
