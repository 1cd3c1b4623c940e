"""Rotary position embedding (Su et al., 2021), in the sectioned form of M-RoPE and the axial form of vision towers.

Angles are float32. They are worked out once per step (or tower call), never per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Rope(NamedTuple):
    """What rotates a step's queries and keys: cosines and sines, [T, head_dim / 2] each, for both halves of a head alike."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def from_angles(cls, angles: torch.Tensor, dtype: torch.dtype) -> Rope:
        """`angles` float32 [T, head_dim / 2]."""
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))


def _inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


class MRotaryEmbedding(nn.Module):
    """M-RoPE (Wang et al., Qwen2-VL, 2024): the frequencies are cut in sections, one after another, and each section follows
    one axis of the position (time, height, width). `sections` sums to head_dim / 2."""

    inv_freq: torch.Tensor
    axis: torch.Tensor

    def __init__(self, head_dim: int, theta: float, sections: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("inv_freq", _inverse_frequencies(head_dim, theta), persistent=False)
        axis = [i % 3 for i, size in enumerate(sections) for _ in range(size)]
        self.register_buffer("axis", torch.tensor(axis), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """`positions` int [3, T]."""
        angles = positions.T.index_select(1, self.axis) * self.inv_freq  # [T, head_dim / 2], a token's numbers side by side
        return Rope.from_angles(angles, dtype)


class AxialRotaryEmbedding(nn.Module):
    """The rotation of a patch by its row and its column, a half of the frequencies each."""

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", _inverse_frequencies(head_dim // 2, theta), persistent=False)

    def forward(self, coordinates: torch.Tensor) -> Rope:
        """`coordinates` int [N, 2]: row and column. The table stays in float32."""
        angles = coordinates.unsqueeze(-1) * self.inv_freq  # [N, 2, head_dim / 4]
        return Rope.from_angles(angles.flatten(1), torch.float32)
