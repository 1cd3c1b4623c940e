"""Rotary position embedding (Su et al., 2021), in its plain and its multimodal form and the axial form of vision towers.

Angles are float32. They are worked out once per step (or tower call), never per layer.
"""

from __future__ import annotations

import math
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


def inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    """float32 [dim / 2]."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def llama3_frequencies(
    frequencies: torch.Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_len: int
) -> torch.Tensor:
    """Llama 3.1's stretching of `inverse_frequencies` to a longer context: a frequency that turns fewer than `low_freq_factor`
    times in `original_len` tokens is divided by `factor`, one that turns more than `high_freq_factor` times stays, and between
    the two it goes over from one to the other in proportion to its turns."""
    turns = original_len * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * kept + frequencies / factor * (1 - kept)


def sectioned_axes(sections: Sequence[int]) -> list[int]:
    """Which axis of a position each frequency follows, in M-RoPE (Wang et al., Qwen2-VL, 2024): the first `sections[0]` time, the
    next ones height, the rest width. `sections` sums to head_dim / 2."""
    return [axis for axis, size in enumerate(sections) for _ in range(size)]


def interleaved_axes(sections: Sequence[int]) -> list[int]:
    """The same for Qwen3-VL, whose axes take turns, so that each has high and low frequencies: time, height, width, time, ...
    until height and width have as many as their sections say; the rest is time's."""
    return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections))]


class RotaryEmbedding(nn.Module):
    """Each frequency [head_dim / 2] follows one axis of the position: `axes`, as many ints; None: the only one."""

    inv_freq: torch.Tensor
    axes: torch.Tensor

    def __init__(self, frequencies: torch.Tensor, axes: Sequence[int] | None = None) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("axes", torch.tensor([0] * len(frequencies) if axes is None else axes), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """`positions` int [axes, T]."""
        angles = positions.T.index_select(1, self.axes) * self.inv_freq  # [T, head_dim / 2], a token's numbers side by side
        return Rope.from_angles(angles, dtype)


class AxialRotaryEmbedding(nn.Module):
    """The rotation of a patch by its row and its column, a half of the frequencies each."""

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(head_dim // 2, theta), persistent=False)

    def forward(self, coordinates: torch.Tensor) -> Rope:
        """`coordinates` int [N, 2]: row and column. The table stays in float32."""
        angles = coordinates.unsqueeze(-1) * self.inv_freq  # [N, 2, head_dim / 4]
        return Rope.from_angles(angles.flatten(1), torch.float32)
