"""What vision towers are made of.

uint8 patches go in, embeddings of picture tokens come out, many pictures in one call. Whatever depends only on a picture's grid
is made once and kept on the device. Grids are Python ints on the host: nothing here reads the device back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmv1.config import Normalization, positive_number, section, whole_number
from mmv1.errors import ConfigError
from mmv1.kernels import ops_for
from mmv1.models.interface import VarlenAttention
from mmv1.models.layers.linear import Linear, aligned_size, empty_parameter
from mmv1.models.layers.norm import LayerNorm, RMSNorm
from mmv1.models.layers.rotary import Rope
from mmv1.models.weights import Piece

NORM_EPS = 1e-6
_PATCHES_KEPT = 1 << 19  # in tables of grids: 32 MiB at 64 bytes a patch, the most that a tower keeps
MOST_PICTURES = 32  # in a padded layout

Norm = RMSNorm | LayerNorm
Tables = TypeVar("Tables")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """What every tower says of itself. A merge unit is spatial_merge_size^2 patches, one token of the language model."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    rope_theta: float

    @classmethod
    def read(cls, vision: Mapping[str, Any], **sizes: int) -> VisionConfig:
        """`vision`: config.json's vision_config; `sizes`: those that the family spells otherwise. Raises ConfigError."""
        names = {"hidden_size", "intermediate_size", "out_hidden_size"} - sizes.keys()
        sizes |= {name: whole_number(vision, name) for name in names}
        num_heads = whole_number(vision, "num_heads")
        if sizes["hidden_size"] % (4 * num_heads):
            raise ConfigError("config.json: a head of the vision tower must have a multiple of 4 numbers: "
                              f"{sizes['hidden_size']} for {num_heads} heads")
        return cls(
            **sizes,
            depth=whole_number(vision, "depth"),
            num_heads=num_heads,
            in_channels=whole_number(vision, "in_channels", whole_number(vision, "in_chans", 3)),
            patch_size=whole_number(vision, "patch_size"),
            temporal_patch_size=whole_number(vision, "temporal_patch_size", 2),
            spatial_merge_size=whole_number(vision, "spatial_merge_size", 2),
            rope_theta=positive_number(section(vision, "rope_parameters"), "rope_theta", 10_000.0),
        )

    @property
    def patch_numbers(self) -> int:
        """Numbers (bytes, as uint8) in one frame of one patch: channel, row, column."""
        return self.in_channels * self.patch_size**2


class PatchEmbed(nn.Module):
    """Normalise uint8 patches and project them. The checkpoint's kernel spans two frames; a still picture's are equal, so
    its two halves are added at load and one frame is all that is stored, sent and multiplied."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: VisionConfig, scale: Normalization, *, bias: bool) -> None:
        super().__init__()
        self._kernel = (config.hidden_size, config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self._unit = config.spatial_merge_size**2
        self.weight = empty_parameter(config.hidden_size, aligned_size(config.patch_numbers))
        self.weight[:, config.patch_numbers :].zero_()
        self.bias = empty_parameter(config.hidden_size) if bias else None
        self._kernel_columns = config.patch_numbers
        # The very numbers of transformers' rescale_and_normalize, which folds the rescaling into mean and std in float32.
        for name, values in (("mean", scale.mean), ("std", scale.std)):
            folded = torch.tensor(values, dtype=torch.float32) * (1.0 / scale.rescale_factor)
            self.register_buffer(name, folded, persistent=False)

    def checkpoint_pieces(self, path: str) -> Iterator[Piece]:
        target = self.weight[:, : self._kernel_columns]
        yield Piece(target, f"{path}.proj.weight", self._kernel, lambda kernel: kernel.float().sum(dim=2).flatten(1))
        if self.bias is not None:
            yield Piece(self.bias, f"{path}.proj.bias", tuple(self.bias.shape))

    def normalize(self, patches: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[N, aligned width] in the weight's dtype: bit for bit what the image processor gives, then zeroes. `order` int64
        [N / unit]: which merge unit of `patches` uint8 [N, patch_numbers] comes at each place."""
        weight = self.weight
        ops = ops_for(patches.device)
        return ops.normalize_patches(patches, order, self._unit, self.mean, self.std, weight.shape[1], weight.dtype)

    def forward(self, patches: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size]."""
        return ops_for(patches.device).linear(self.normalize(patches, order), self.weight, self.bias)


class VisionAttention(nn.Module):
    """Bidirectional attention inside the planned segments. The checkpoint has q, k and v merged already."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._num_heads = config.num_heads
        self._scale = (config.hidden_size // config.num_heads) ** -0.5
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden: torch.Tensor, rope: Rope, attention: VarlenAttention, plan: Any) -> torch.Tensor:
        qkv = self.qkv(hidden).unflatten(-1, (3 * self._num_heads, -1))  # [N, 3 heads, head_dim]
        rotated = ops_for(qkv.device).rotate_(qkv[:, : 2 * self._num_heads], rope.cos, rope.sin)
        query, key = rotated.chunk(2, dim=1)
        attended = attention.varlen(query, key, qkv[:, 2 * self._num_heads :], plan, self._scale)
        return self.proj(attended.flatten(1))


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: VisionConfig, norm: type[Norm], mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = norm(config.hidden_size, NORM_EPS)
        self.mlp = mlp

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, rope: Rope, attention: VarlenAttention, plan: Any, next_norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DecoderLayer.forward`: the residual stream normalised and as it is, in and out."""
        hidden, residual = self.norm2.add(self.attn(hidden, rope, attention, plan), residual)
        return next_norm.add(self.mlp(hidden), residual)


class PatchMerger(nn.Module):
    """The patches of a merge unit, side by side, become one token of the language model's width."""

    def __init__(self, config: VisionConfig, norm: type[Norm], *, norms_merged: bool = False) -> None:
        """`norms_merged`: the norm is of a unit's patches side by side, not of each patch."""
        super().__init__()
        self._merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm = norm(self._merged_size if norms_merged else config.hidden_size, NORM_EPS)
        self.fc1 = Linear(self._merged_size, self._merged_size, bias=True)
        self.fc2 = Linear(self._merged_size, config.out_hidden_size, bias=True)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """`normed` [N, hidden_size] as `norm` gives it, a unit's patches next to each other. Returns [units, out_hidden_size]."""
        return self.fc2(F.gelu(self.fc1(normed.view(-1, self._merged_size))))

    def normed(self, residual: torch.Tensor) -> torch.Tensor:
        """Of the stream [N, hidden_size], for a merger that `norms_merged`."""
        return self.norm(residual.view(-1, self._merged_size))


def patch_coordinates(height: int, width: int, merge: int, order: np.ndarray | None = None) -> np.ndarray:
    """Row and column of each patch of a grid, int64 [patches, 2], unit by unit, inside a unit by row and column. `order` [units]:
    the unit at each place; None: row by row."""
    units = np.indices((height // merge, width // merge)).reshape(2, -1).T
    inside = np.indices((merge, merge)).reshape(2, -1).T
    corners = (units if order is None else units[order]) * merge
    return (corners[:, None] + inside).reshape(-1, 2)


class GridCache(Generic[Tables]):
    """What `make` makes of a picture's grid of (height, width) patches, kept for those that were asked for last."""

    def __init__(self, make: Callable[[int, int], Tables]) -> None:
        self._make = make
        self._kept: OrderedDict[tuple[int, int], Tables] = OrderedDict()
        self._num_patches = 0

    def __call__(self, height: int, width: int) -> Tables:
        grid = height, width
        if grid in self._kept:
            self._kept.move_to_end(grid)
            return self._kept[grid]
        tables = self._kept[grid] = self._make(height, width)
        self._num_patches += height * width
        while self._num_patches > _PATCHES_KEPT and len(self._kept) > 1:
            (old_height, old_width), _ = self._kept.popitem(last=False)
            self._num_patches -= old_height * old_width
        return tables


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it is at."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
