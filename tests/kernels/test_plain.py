"""Plain operations to the bit: what a CPU computes does not change with how it is written."""

from __future__ import annotations

import pytest
import torch

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
