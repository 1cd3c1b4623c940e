"""Rotary position embedding; for a language model together with what else happens to a head before attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows

_HEADS = 8  # of a token, in one program


def rotate_and_store(
    qkv: torch.Tensor,
    num_kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_rows(qkv, cos, sin)
    num_tokens, all_heads, head_dim = qkv.shape
    num_heads = all_heads - 2 * num_kv_heads
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    key = torch.empty((num_tokens, num_kv_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    keys, values = kv_cache.flatten(1, 2).unbind(0)
    has_norm = q_norm is not None and k_norm is not None
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(all_heads, _HEADS))](
        qkv, cos, sin, slot_mapping, q_norm if has_norm else qkv, k_norm if has_norm else qkv, query, key, keys, values,
        qkv.stride(0), qkv.stride(1), cos.stride(0), sin.stride(0), keys.stride(0), keys.stride(1), eps,
        has_norm, num_heads, num_kv_heads, head_dim // 2, _HEADS, triton.next_power_of_2(head_dim // 2), num_warps=2,
        enable_fp_fusion=False,  # or the compiler makes one bfloat16 operation of a product, its rounding and a sum
    )  # fmt: skip
    return query, key, qkv[:, -num_kv_heads:]


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    check_rows(x, cos, sin)
    num_tokens, num_heads, head_dim = x.shape
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS))](
        x, cos, sin, x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), num_heads, head_dim // 2, _HEADS,
        triton.next_power_of_2(head_dim // 2), num_warps=2,
    )  # fmt: skip
    return x


@triton.jit
def _rotate(first, second, cos, sin, dtype: tl.constexpr):
    """Both halves of heads, turned; products rounded to `dtype`, that of separate torch operations."""
    turned = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    return turned, (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)


# Slots lie somewhere in a buffer that holds a step's numbers: nothing may be compiled for where.
@triton.jit(do_not_specialize=["slot_mapping"])
def _rotate_and_store_kernel(
    qkv, cos, sin, slot_mapping, q_norm, k_norm, query, key, key_cache, value_cache,
    token_stride, head_stride, cos_stride, sin_stride, slot_stride, cache_head_stride, eps,
    has_norm: tl.constexpr, num_heads: tl.constexpr, num_kv_heads: tl.constexpr, half: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = query.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads + 2 * num_kv_heads) & (pair < half)
    is_query = inside & (head < num_heads)
    is_key = inside & (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = inside & (head >= num_heads + num_kv_heads)
    place = qkv + token * token_stride + head * head_stride + pair
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + half, mask=inside, other=0.0)
    slot = tl.load(slot_mapping + token).to(tl.int64)

    value_place = value_cache + slot * slot_stride + (head - num_heads - num_kv_heads) * cache_head_stride + pair
    tl.store(value_place, first, mask=is_value)
    tl.store(value_place + half, second, mask=is_value)

    first, second = first.to(tl.float32), second.to(tl.float32)
    if has_norm:
        inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * half) + eps)
        weight = tl.where(is_query, q_norm + pair, k_norm + pair)
        scale = tl.load(weight, mask=is_query | is_key, other=0.0).to(tl.float32)
        first = ((first * inverse).to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)
        scale = tl.load(weight + half, mask=is_query | is_key, other=0.0).to(tl.float32)
        second = ((second * inverse).to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)
    turn = tl.load(cos + token * cos_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    lift = tl.load(sin + token * sin_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    first, second = _rotate(first, second, turn, lift, cos.dtype.element_ty)
    first, second = first.to(dtype), second.to(dtype)

    query_place = query + (token * num_heads + head) * (2 * half) + pair
    tl.store(query_place, first, mask=is_query)
    tl.store(query_place + half, second, mask=is_query)
    key_place = key + (token * num_kv_heads + head - num_heads) * (2 * half) + pair
    tl.store(key_place, first, mask=is_key)
    tl.store(key_place + half, second, mask=is_key)
    cache_place = key_cache + slot * slot_stride + (head - num_heads) * cache_head_stride + pair
    tl.store(cache_place, first, mask=is_key)
    tl.store(cache_place + half, second, mask=is_key)


@triton.jit
def _rotate_kernel(
    x, cos, sin, token_stride, head_stride, cos_stride, sin_stride,
    num_heads: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads) & (pair < half)
    place = x + token * token_stride + head * head_stride + pair
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(cos + token * cos_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    lift = tl.load(sin + token * sin_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    first, second = _rotate(first, second, turn, lift, tl.float32)
    tl.store(place, first.to(dtype), mask=inside)
    tl.store(place + half, second.to(dtype), mask=inside)
