"""Plain operations to the bit: what a CPU computes does not change with how it is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.activations import QuickGELUActivation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from mmv1.kernels import plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 3, 8), (37, 6, 20), (5, 4, 128), (300, 12, 6)])
def test_rotation_by_halves_is_that_of_whole_heads(dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> None:
    qkv, angles = torch.randn(tokens, heads, head_dim).to(dtype), torch.randn(tokens, head_dim // 2) * 4
    for table in (dtype, torch.float32):
        cos, sin = angles.cos().to(table), angles.sin().to(table)
        whole_cos, whole_sin = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
        rotated = qkv[:, : heads - 1]
        expected = torch.addcmul(rotated * whole_cos, rotated.roll(head_dim // 2, dims=-1), whole_sin).to(dtype)
        cache = torch.zeros(2, tokens, 1, 1, head_dim, dtype=dtype)
        query, key, _ = plain.rotate_and_store(qkv, 1, cos, sin, torch.arange(tokens, dtype=torch.int32), cache)
        assert torch.equal(torch.cat((query, key), dim=1), expected)
    assert torch.equal(plain.rotate_(rotated.clone(), cos, sin), expected)


def test_pixels_are_those_of_the_image_processor() -> None:
    """Every byte, by the very numbers that transformers folds of the published mean and standard deviation."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32) * 255.0
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, -1)
    result = plain.normalize_patches(every, torch.tensor([0]), 1, mean, std, 768, torch.float32)
    assert torch.equal(result.view(3, 256), (torch.arange(256).float() - mean[:, None]) / std[:, None])


def test_the_fast_gelu_is_transformers() -> None:
    x = (torch.randn(50, 80) * 4).bfloat16()
    assert torch.equal(plain.quick_gelu(x), QuickGELUActivation()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_mixture_of_experts_is_transformers(dtype: torch.dtype, renormalize: bool) -> None:
    config = SimpleNamespace(
        num_experts=24, num_experts_per_tok=4, hidden_size=48, moe_intermediate_size=40, norm_topk_prob=renormalize,
        hidden_act="silu", _experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    router, theirs = Qwen3MoeTopKRouter(config).to(dtype), Qwen3MoeExperts(config).to(dtype)
    for parameter in (router.weight, theirs.gate_up_proj, theirs.down_proj):
        parameter.requires_grad_(False).normal_()
    x = torch.randn(33, 48).to(dtype)
    logits, weights, ids = router(x)
    our_weights, our_ids = plain.route(logits, 4, renormalize)
    assert torch.equal(our_weights, weights) and torch.equal(our_ids.long(), ids)
    assert torch.equal(plain.experts(x, theirs.gate_up_proj, theirs.down_proj, our_weights, our_ids), theirs(x, ids, weights))
