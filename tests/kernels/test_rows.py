"""Kernels step through a row by one. What lies in memory otherwise is refused, not misread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmv1.kernels import fused
from mmv1.kernels.sampling import gumbel_argmax


def turned(*shape: int) -> torch.Tensor:
    """Numbers whose first two axes lie in memory in the other order."""
    return torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)


X, WEIGHT, TABLE = torch.randn(4, 16), torch.ones(16), torch.randn(16, 16)
IDS, SLOTS, CACHE = torch.zeros(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32), torch.zeros(2, 2, 4, 1, 16)
QKV, ANGLES, NO_PICTURES = torch.randn(4, 3, 16), torch.randn(4, 8), -torch.ones(4, dtype=torch.int32)

TAPS, WEIGHTS = torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fused.rms_norm(turned(4, 16), WEIGHT, 1e-6),
        lambda: fused.add_rms_norm(turned(4, 16), X, WEIGHT, 1e-6),
        lambda: fused.add_rms_norm(X, turned(4, 16), WEIGHT, 1e-6),
        lambda: fused.layer_norm(turned(4, 16), WEIGHT, WEIGHT, 1e-6),
        lambda: fused.add_layer_norm(turned(4, 16), X, WEIGHT, WEIGHT, 1e-6),
        lambda: fused.add_layer_norm(X, turned(4, 16), WEIGHT, WEIGHT, 1e-6),
        lambda: fused.silu_and_mul(turned(4, 16)),
        lambda: fused.quick_gelu(turned(4, 16)),
        lambda: fused.embed(IDS, turned(16, 16), NO_PICTURES, X),
        lambda: fused.embed(IDS, TABLE, NO_PICTURES, turned(4, 16)),
        lambda: fused.add_interpolated(turned(4, 16), TABLE, TAPS, WEIGHTS),
        lambda: fused.add_interpolated(X, turned(16, 16), TAPS, WEIGHTS),
        lambda: fused.add_interpolated(X, TABLE, TAPS, turned(4, 4)),
        lambda: fused.rotate_and_store(QKV, 1, turned(4, 8), ANGLES, SLOTS, CACHE),
        lambda: fused.rotate_and_store(QKV, 1, ANGLES, turned(4, 8), SLOTS, CACHE),
        lambda: fused.rotate_(QKV, turned(4, 8), ANGLES),
        lambda: fused.linear(turned(4, 16).half(), TABLE.half(), None),
        lambda: fused.route(turned(4, 16), 2, True),
        lambda: fused.experts(turned(4, 16), torch.ones(4, 12, 16), torch.ones(4, 16, 6), X[:, :2], torch.ones(4, 2).int()),
        lambda: fused.experts(X, turned(4, 12, 16), torch.ones(4, 16, 6), X[:, :2], torch.ones(4, 2).int()),
        lambda: fused.experts(X, torch.ones(4, 12, 16), turned(4, 16, 6), X[:, :2], torch.ones(4, 2).int()),
        lambda: gumbel_argmax(turned(4, 16), torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_numbers_that_lie_apart_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="strides"):
        call()
