"""What every set of operations has to do, whoever computes them and where: checks of one operation each, for any sizes.

Expected values come from separate torch operations in the tensors' dtype, as transformers writes them. Inputs are views into
buffers of NaN, outputs are NaN before they are written, so that what is read or left out by mistake is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

EPS = 1e-2  # large enough to be missed
_RELATIVE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Setting(NamedTuple):
    ops: ModuleType
    device: str
    dtype: torch.dtype
    rounds: bool  # to the nearest: Triton's interpreter cuts off what does not fit in a bfloat16
    like_transformers: bool = False  # nearly every number is to be that of separate operations, to the bit

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers, in a view whose rows lie apart."""
        return apart(torch.randn(shape, device=self.device).to(dtype or self.dtype))

    def ints(self, values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return apart(torch.tensor(values, dtype=dtype, device=self.device))

    def close(self, actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
        """Equal but for a few units in the last place, of numbers of size `scale`."""
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        relative = _RELATIVE[actual.dtype]
        torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=scale * relative)
        if self.like_transformers and actual.dtype == torch.bfloat16:
            assert (actual != expected).float().mean() < 0.02


def rubbish(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers amid rubbish; the last axis stays contiguous."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + 8)
    buffer = torch.full(shape, rubbish(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = buffer[..., 4:-4]
    view.copy_(tensor)
    return view


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Memory that torch.empty gives is full of rubbish."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(rubbish(tensor.dtype)) if tensor.numel() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(1) for t in (cos, sin))
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin).to(x.dtype)


def check_rms_norm(s: Setting, rows: int, width: int) -> None:
    x, weight = s.random(rows, width), s.random(1, width)[0]
    s.close(s.ops.rms_norm(x, weight, EPS), normed(x, weight))


def check_add_rms_norm(s: Setting, rows: int, width: int) -> None:
    x, residual, weight = s.random(rows, width), s.random(rows, width), s.random(1, width)[0]
    before = residual.clone()
    result, total = s.ops.add_rms_norm(x, residual, weight, EPS)
    s.close(total, residual + x)
    s.close(result, normed(residual + x, weight), scale=4.0)
    assert torch.equal(residual, before)


def check_add_rms_norm_of_parts(s: Setting, parts: int, rows: int, width: int) -> None:
    x = s.random(parts, rows, width, dtype=torch.float32)
    residual, weight = s.random(rows, width), s.random(1, width)[0]
    result, total = s.ops.add_rms_norm(x, residual, weight, EPS)
    expected = residual + x.sum(dim=0).to(s.dtype)
    s.close(total, expected, scale=2.0)
    s.close(result, normed(expected, weight), scale=4.0)


def layer_normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rounded once. In float64: what is exact has no order of sums."""
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double() + bias.double()).to(x.dtype)


def check_layer_norm(s: Setting, rows: int, width: int) -> None:
    x, weight, bias = s.random(rows, width) + 3.0, s.random(1, width)[0], s.random(1, width)[0]
    s.close(s.ops.layer_norm(apart(x), weight, bias, EPS), layer_normed(x, weight, bias), scale=4.0)


def check_add_layer_norm(s: Setting, rows: int, width: int) -> None:
    x, residual, weight, bias = s.random(rows, width), s.random(rows, width), s.random(1, width)[0], s.random(1, width)[0]
    before = residual.clone()
    result, total = s.ops.add_layer_norm(x, residual, weight, bias, EPS)
    s.close(total, residual + x)
    s.close(result, layer_normed(residual + x, weight, bias), scale=4.0)
    assert torch.equal(residual, before)


def check_add_layer_norm_of_parts(s: Setting, parts: int, rows: int, width: int) -> None:
    x = s.random(parts, rows, width, dtype=torch.float32)
    residual, weight, bias = s.random(rows, width), s.random(1, width)[0], s.random(1, width)[0]
    result, total = s.ops.add_layer_norm(x, residual, weight, bias, EPS)
    expected = residual + x.sum(dim=0).to(s.dtype)
    s.close(total, expected, scale=2.0)
    s.close(result, layer_normed(expected, weight, bias), scale=4.0)


def check_silu_and_mul(s: Setting, rows: int, width: int) -> None:
    x = s.random(rows, 2 * width)
    x[0, 0], x[0, width] = 60.0, 2.0  # beyond where exp is of use
    x[-1, width - 1], x[-1, -1] = -60.0, 2.0
    s.close(s.ops.silu_and_mul(x), F.silu(x[:, :width]) * x[:, width:])


def check_quick_gelu(s: Setting, rows: int, width: int) -> None:
    x = s.random(rows, width)
    x[0, 0], x[-1, -1] = 50.0, -50.0  # beyond where exp is of use
    s.close(s.ops.quick_gelu(x), x * torch.sigmoid(1.702 * x))


def check_rotate_and_store(
    s: Setting, rows: int, heads: int, kv_heads: int, head_dim: int, *, norm: bool, angles: torch.dtype | None = None
) -> None:
    qkv = s.random(rows, heads + 2 * kv_heads, head_dim)
    angle = torch.randn(rows, head_dim // 2, device=s.device) * 3
    cos, sin = apart(angle.cos().to(angles or s.dtype)), angle.sin().to(angles or s.dtype)
    block_size, num_blocks = 4, rows // 2 + 2
    slots = s.ints(torch.randperm(num_blocks * block_size)[:rows].tolist())
    cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=s.dtype, device=s.device)
    q_norm, k_norm = (s.random(1, head_dim)[0], s.random(1, head_dim)[0]) if norm else (None, None)
    before = qkv.clone()
    query, key, value = s.ops.rotate_and_store(qkv, kv_heads, cos, sin, slots, cache, q_norm, k_norm, EPS)
    assert torch.equal(qkv, before)
    expected_query, expected_key = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        expected_query, expected_key = normed(expected_query, q_norm), normed(expected_key, k_norm)
    scale = 4.0 if norm else 2.0
    s.close(query, rotated(expected_query, cos, sin), scale)
    s.close(key, rotated(expected_key, cos, sin), scale)
    assert torch.equal(value, qkv[:, heads + kv_heads :])
    keys, values = cache.flatten(1, 2)
    assert torch.equal(keys[slots.long()], key) and torch.equal(values[slots.long()], value)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool, device=s.device)
    untouched[slots.long()] = False
    assert keys[untouched].isnan().all() and values[untouched].isnan().all()


def check_rotate_(s: Setting, rows: int, heads: int, head_dim: int) -> None:
    """A view of some of the heads; the others stay."""
    everything = s.random(rows, heads + 3, head_dim)
    before = everything.clone()
    x = everything[:, 1 : 1 + heads]
    angle = torch.randn(rows, head_dim // 2, device=s.device) * 3
    expected = rotated(x.float(), angle.cos(), angle.sin()).to(s.dtype)
    result = s.ops.rotate_(x, angle.cos(), angle.sin())
    assert result.data_ptr() == x.data_ptr()
    s.close(x, expected, scale=2.0)
    assert torch.equal(everything[:, :1], before[:, :1]) and torch.equal(everything[:, 1 + heads :], before[:, 1 + heads :])


def check_embed(s: Setting, rows: int, vocab: int, width: int, levels: int) -> None:
    table, images = s.random(vocab, width), s.random(7, levels * width)
    images[3] = float("nan")  # of no token
    ids = torch.randint(0, vocab, (rows,)).tolist()
    image_rows = [(-1, 6, 0, -1, 2)[i % 5] for i in range(rows)]
    result = s.ops.embed(s.ints(ids), table, s.ints(image_rows), images)
    text = torch.cat((table, torch.zeros(vocab, (levels - 1) * width, dtype=s.dtype, device=s.device)), dim=1)
    expected = torch.stack([text[i] if row < 0 else images[row] for i, row in zip(ids, image_rows, strict=True)])
    assert torch.equal(result, expected)
    without = s.ops.embed(s.ints(ids), table, s.ints([-1] * rows), images[:0])
    assert torch.equal(without, text[torch.tensor(ids, device=s.device)])


def check_add_interpolated(s: Setting, rows: int, places: int, width: int) -> None:
    x, table = s.random(rows, width), s.random(places, width)
    indices = apart(torch.randint(0, places - 1, (rows, 4), device=s.device))
    table[places - 1] = float("nan")  # of no patch
    along, across = torch.rand(rows, 1, device=s.device), torch.rand(rows, 1, device=s.device)
    weights = torch.cat(((1 - along) * (1 - across), (1 - along) * across, along * (1 - across), along * across), dim=1)
    before = x.clone()
    mean = sum(weights[:, tap, None] * table[indices[:, tap]].float() for tap in range(4))
    s.close(s.ops.add_interpolated(x, table, indices, apart(weights)), x + mean.to(s.dtype), scale=2.0)  # type: ignore[union-attr]
    assert torch.equal(x, before)


def check_normalize_patches(s: Setting, units: int, unit: int, channels: int, pixels: int, padded_width: int) -> None:
    patches = apart(torch.randint(0, 256, (units * unit, channels * pixels), dtype=torch.uint8, device=s.device))
    order = torch.randperm(units).to(s.device)
    mean, std = torch.rand(channels, device=s.device) * 255, torch.rand(channels, device=s.device) * 60 + 1
    dtype = s.dtype if s.rounds else torch.float32
    result = s.ops.normalize_patches(patches, order, unit, mean, std, padded_width, dtype)
    ordered = torch.cat([patches[int(place) * unit : (int(place) + 1) * unit] for place in order])
    expected = (ordered.float() - mean.repeat_interleave(pixels)) / std.repeat_interleave(pixels)
    assert torch.equal(result[:, : channels * pixels], expected.to(dtype))
    assert result.shape == (units * unit, padded_width) and not result[:, channels * pixels :].any()


def check_linear(s: Setting, tokens: int, rows: int, width: int) -> None:
    x, bias = s.random(tokens, width), s.random(1, rows)[0]
    weight = torch.randn(rows, width, device=s.device).div_(width**0.5).to(s.dtype)
    exact = x.float() @ weight.float().T
    tolerance = _RELATIVE[s.dtype] / 4
    for result, expected in (
        (s.ops.linear(x, weight, bias), exact + bias.float()),
        (s.ops.linear(x, weight, None), exact),
    ):
        assert result.dtype == s.dtype
        torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)
    check_partial(s.ops.linear_partial(x, weight), exact, s.dtype)


def check_partial(result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == (torch.float32 if result.dim() == 3 else dtype)
    total = result.float().sum(dim=0) if result.dim() == 3 else result.float()
    torch.testing.assert_close(total, exact, rtol=_RELATIVE[dtype] / 4, atol=_RELATIVE[dtype] / 4)


def check_route(s: Setting, tokens: int, num_experts: int, top_k: int) -> None:
    logits = s.random(tokens, num_experts) * 2
    for renormalize in (False, True):
        weights, ids = s.ops.route(apart(logits), top_k, renormalize)
        assert weights.dtype == s.dtype and ids.dtype == torch.int32 and weights.shape == ids.shape == (tokens, top_k)
        assert all(len(set(row)) == top_k for row in ids.tolist())
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.gather(1, ids.long())
        # By their probabilities: of two experts that are equally likely either may come.
        torch.testing.assert_close(chosen, probabilities.sort(descending=True).values[:, :top_k], rtol=1e-5, atol=0.0)
        s.close(weights, (chosen / chosen.sum(dim=1, keepdim=True) if renormalize else chosen).to(s.dtype), scale=0.0)


def check_experts(s: Setting, tokens: int, num_experts: int, top_k: int, hidden: int, width: int) -> None:
    """Token by token. Experts and numbers that nobody asks for are NaN."""
    x = s.random(tokens, hidden)
    gate_up = torch.randn(num_experts, 2 * width, hidden, device=s.device).div_(hidden**0.5).to(s.dtype)
    down = torch.randn(num_experts, hidden, width, device=s.device).div_(width**0.5).to(s.dtype)
    weights = apart(torch.rand(tokens, top_k, device=s.device).to(s.dtype))
    ids = torch.stack([torch.randperm(num_experts - 1)[:top_k] for _ in range(tokens)])  # the last is nobody's
    gate_up[-1], down[-1] = float("nan"), float("nan")
    before = x.clone()
    result = s.ops.experts(x, gate_up, down, weights, apart(ids.int().to(s.device)))
    assert torch.equal(x, before)
    expected = torch.zeros(tokens, hidden, device=s.device)
    for token in range(tokens):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = F.linear(x[token], gate_up[expert]).chunk(2)
            expected[token] += (F.linear(F.silu(gate) * up, down[expert]) * weight).float()
    # Nobody has to round as often as transformers does; two products and a sum of experts add up float32's rounding.
    s._replace(like_transformers=False).close(result, expected.to(s.dtype), scale=4.0 if s.dtype == torch.float32 else 1.0)
