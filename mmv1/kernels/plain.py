"""Every operation in plain torch, on any device: what the fused kernels mean.

T is the number of tokens, N of patches. Nothing here reads the device back, but `experts`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis, in float32 (Zhang and Sennrich, 2019). `x` [T, h]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(r), r) with r = residual + x, [T, h] each. `x`: [T, h], or what `linear_partial` gave."""
    residual = _add(x, residual)
    return rms_norm(residual, weight, eps), residual


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / deviation * weight + bias over the last axis, in float32, rounded once (Ba et al., 2016). `x` [T, h]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(r), r) with r = residual + x, [T, h] each. `x`: [T, h], or what `linear_partial` gave."""
    residual = _add(x, residual)
    return layer_norm(residual, weight, bias, eps), residual


def _add(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    if x.dim() == 3:
        x = x.sum(dim=0).to(residual.dtype)
    return residual + x


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (SwiGLU; Shazeer, 2020). `x` [T, 2F]: gate, then up. Returns [T, F]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), near the Gaussian error linear unit (Hendrycks and Gimpel, 2016). `x` [T, h]."""
    return x * torch.sigmoid(1.702 * x)


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
    """Queries and keys normalised per head where a weight [D] is given, and rotated; keys and values written to the cache.

    `qkv` [T, H + 2 KV, D]; `cos`, `sin` [T, D / 2], in whose dtype or `qkv`'s, the wider, the rotation is computed;
    `slot_mapping` int [T]: block * block_size + place; `kv_cache` [2, num_blocks, block_size, KV, D]. A token that nobody
    reads needs a slot too: one in a block of its own. Returns query [T, H, D], key and value [T, KV, D].
    """
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    rotated, value = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        query, key = rotated.split((num_heads, num_kv_heads), dim=1)
        heads = (F.rms_norm(query, q_norm.shape, q_norm, eps), F.rms_norm(key, k_norm.shape, k_norm, eps))
        rotated = torch.cat(heads, dim=1)
    query, key = _rotate(rotated, cos, sin).split((num_heads, num_kv_heads), dim=1)
    keys, values = kv_cache.flatten(1, 2).unbind(0)  # [slots, KV, D] each
    slots = slot_mapping.long()
    keys.index_copy_(0, slots, key)
    values.index_copy_(0, slots, value)
    return query, key, value


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` [N, heads, D], a view whose last axis is contiguous, rotated in place in float32. `cos`, `sin` float32 [N, D / 2]."""
    return x.copy_(_rotate(x, cos, sin))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021): place i of a head turns together with place i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)


def embed(
    input_ids: torch.Tensor, table: torch.Tensor, image_rows: torch.Tensor, image_embeddings: torch.Tensor
) -> torch.Tensor:
    """Vectors [T, E] of a step's tokens: row `image_rows` [T] of `image_embeddings` [rows, E] for tokens of pictures; where that
    is -1, row `input_ids` [T] of `table` [V, h], and zeros behind it. E = n h: a picture's token brings what is added to it in
    n - 1 later layers (DeepStack; Meng et al., 2024)."""
    vectors = F.embedding(input_ids, table)
    further = image_embeddings.shape[1] - table.shape[1]
    if further:
        vectors = F.pad(vectors, (0, further))
    if not image_embeddings.shape[0]:
        return vectors
    pictures = image_embeddings.index_select(0, image_rows.clamp(min=0))
    return torch.where((image_rows >= 0).unsqueeze(1), pictures, vectors)


def add_interpolated(x: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x + a mean of four rows of a table: of the learned positions around a patch. `x` [N, h], `table` [P, h], `indices` int
    [N, 4], `weights` float32 [N, 4]. The mean is float32, rounded before it is added."""
    taps = F.embedding(indices, table) * weights.unsqueeze(-1)  # float32 [N, 4, h]
    return x + taps.sum(dim=1).to(x.dtype)


def normalize_patches(
    patches: torch.Tensor,
    order: torch.Tensor,
    unit: int,
    mean: torch.Tensor,
    std: torch.Tensor,
    padded_width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Pixels as a tower's first product takes them: units of `unit` patches put in `order` int [N / unit], (x - mean) / std in
    float32 per channel, rounded to `dtype`, zeros past a patch's end.

    `patches` uint8 [N, P], P = C x pixels of a channel; `mean`, `std` float32 [C]. Returns [N, padded_width].
    """
    ordered = patches.unflatten(0, (-1, unit)).index_select(0, order).flatten(0, 1)
    channels = ordered.unflatten(-1, (mean.shape[0], -1)).float()
    normalized = channels.sub_(mean.unsqueeze(1)).div_(std.unsqueeze(1)).flatten(1).to(dtype)
    return F.pad(normalized, (0, padded_width - normalized.shape[1]))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b. `x` [T, K], `weight` [N, K], `bias` [N]. Returns [T, N]."""
    return F.linear(x, weight, bias)


def linear_partial(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T for `add_rms_norm`, which takes it as it comes: [T, N], or float32 [S, T, N] that is still to be summed."""
    return F.linear(x, weight)


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Who computes a token of a mixture of experts, and how much each counts: the `top_k` likeliest of softmax(logits), likeliest
    first (Shazeer et al., 2017). `logits` [T, E]. Returns weights [T, top_k] in their dtype, rounded from float32, and ids int32
    [T, top_k], all different. `renormalize`: a token's weights add up to 1 before they are rounded."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, ids = probabilities.topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids.int()


def experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_weights: torch.Tensor, expert_ids: torch.Tensor
) -> torch.Tensor:
    """The sum over a token's k experts of weight * down(silu(gate(x)) * up(x)), added up in the order of their ids, rounded after
    every operation. `x` [T, H]; `gate_up` [E, 2I, H]: gate, then up; `down` [E, H, I]; `expert_weights` [T, k] and `expert_ids`
    int32 [T, k] of `route`. Returns [T, H]. Waits for the device, to learn which experts there is work for."""
    out = torch.zeros_like(x)
    for expert in expert_ids.unique().tolist():
        place, token = torch.where(expert_ids.t() == expert)
        products = F.linear(silu_and_mul(F.linear(x[token], gate_up[expert])), down[expert])
        out.index_add_(0, token, products * expert_weights[token, place, None])
    return out
