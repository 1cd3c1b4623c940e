"""Qwen2.5-VL's vision tower: uint8 patches in, embeddings of picture tokens out, many pictures in one call.

Attention runs inside windows of the picture in most layers and over the whole picture in a few (Qwen2.5-VL technical report,
2025). Patches are put in window order once, before the first layer; whatever depends only on a picture's grid is made once
and kept on the device. Grids are Python ints on the host: nothing here reads the device back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mmv1.config import Normalization, positive_number, section, whole_number, whole_numbers
from mmv1.errors import ConfigError
from mmv1.kernels import ops_for
from mmv1.models.interface import GridTHW, SegmentRoom, VarlenAttention
from mmv1.models.layers.linear import Linear, aligned_size, empty_parameter
from mmv1.models.layers.mlp import GatedMLP
from mmv1.models.layers.norm import RMSNorm
from mmv1.models.layers.rotary import AxialRotaryEmbedding, Rope
from mmv1.models.weights import Piece

_NORM_EPS = 1e-6
_GRIDS_KEPT = 256  # tables of at most a few hundred KiB each

# Room in a padded layout: windows at the borders of a picture are not full, so there are more than patches would fill.
_MOST_PICTURES = 32
_PATCHES_PER_WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int  # in pixels
    fullatt_block_indexes: frozenset[int]
    rope_theta: float

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any]) -> VisionConfig:
        """`vision`: config.json's vision_config, whose names are the same in both dialects but for the rope's."""
        if vision.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"the vision tower's hidden_act '{vision['hidden_act']}' is not supported, only 'silu'")
        config = cls(
            depth=whole_number(vision, "depth"),
            hidden_size=whole_number(vision, "hidden_size"),
            intermediate_size=whole_number(vision, "intermediate_size"),
            num_heads=whole_number(vision, "num_heads"),
            out_hidden_size=whole_number(vision, "out_hidden_size"),
            in_channels=whole_number(vision, "in_channels", whole_number(vision, "in_chans", 3)),
            patch_size=whole_number(vision, "patch_size"),
            temporal_patch_size=whole_number(vision, "temporal_patch_size", 2),
            spatial_merge_size=whole_number(vision, "spatial_merge_size", 2),
            window_size=whole_number(vision, "window_size"),
            fullatt_block_indexes=frozenset(whole_numbers(vision, "fullatt_block_indexes")),
            rope_theta=positive_number(section(vision, "rope_parameters"), "rope_theta", 10_000.0),
        )
        if config.hidden_size % (4 * config.num_heads):
            raise ConfigError(f"config.json: a head of the vision tower must have a multiple of 4 numbers: {config.hidden_size} "
                              f"for {config.num_heads} heads")
        if config.window_size < config.patch_size * config.spatial_merge_size:
            raise ConfigError(f"config.json: window_size {config.window_size} is smaller than a picture token")
        return config

    @property
    def patch_numbers(self) -> int:
        """Numbers (bytes, as uint8) in one frame of one patch: channel, row, column."""
        return self.in_channels * self.patch_size**2


class PatchEmbed(nn.Module):
    """Normalise uint8 patches and project them. The checkpoint's kernel spans two frames; a still picture's are equal, so
    its two halves are added at load and one frame is all that is stored, sent and multiplied."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: VisionConfig, scale: Normalization) -> None:
        super().__init__()
        self._kernel = (config.hidden_size, config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self._unit = config.spatial_merge_size**2
        self.weight = empty_parameter(config.hidden_size, aligned_size(config.patch_numbers))
        self.weight[:, config.patch_numbers :].zero_()
        self._kernel_columns = config.patch_numbers
        # The very numbers of transformers' rescale_and_normalize, which folds the rescaling into mean and std in float32.
        for name, values in (("mean", scale.mean), ("std", scale.std)):
            folded = torch.tensor(values, dtype=torch.float32) * (1.0 / scale.rescale_factor)
            self.register_buffer(name, folded, persistent=False)

    def checkpoint_pieces(self, path: str) -> Iterator[Piece]:
        target = self.weight[:, : self._kernel_columns]
        yield Piece(target, f"{path}.proj.weight", self._kernel, lambda kernel: kernel.float().sum(dim=2).flatten(1))

    def normalize(self, patches: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[N, aligned width] in the weight's dtype: bit for bit what the image processor gives, then zeroes. `order` int64
        [N / unit]: which merge unit of `patches` uint8 [N, patch_numbers] comes at each place."""
        weight = self.weight
        ops = ops_for(patches.device)
        return ops.normalize_patches(patches, order, self._unit, self.mean, self.std, weight.shape[1], weight.dtype)

    def forward(self, patches: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size]."""
        return ops_for(patches.device).linear(self.normalize(patches, order), self.weight, None)


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
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, _NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, _NORM_EPS)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, rope: Rope, attention: VarlenAttention, plan: Any, next_norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DecoderLayer.forward`: the residual stream normalised and as it is, in and out."""
        hidden, residual = self.norm2.add(self.attn(hidden, rope, attention, plan), residual)
        return next_norm.add(self.mlp(hidden), residual)


class PatchMerger(nn.Module):
    """The patches of a merge unit, side by side, become one token of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._merged_size = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, _NORM_EPS)
        self.mlp = nn.Sequential(
            Linear(self._merged_size, self._merged_size, bias=True),
            nn.GELU(),
            Linear(self._merged_size, config.out_hidden_size, bias=True),
        )

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """`normed` [N, hidden_size] as `ln_q` gives it, a unit's patches next to each other."""
        return self.mlp(normed.view(-1, self._merged_size))


class GridTables(NamedTuple):
    """What follows from a picture's grid alone. A unit is a merge unit: spatial_merge_size^2 patches, one token."""

    window_order: torch.Tensor  # int64 [units]: the unit at each place of window order
    window_places: torch.Tensor  # int64 [units]: its inverse
    coordinates: torch.Tensor  # int64 [patches, 2]: row and column of each patch, in window order
    window_seqlens: tuple[int, ...]  # patches in each window


class TowerLayout(NamedTuple):
    """What the tower must know of a batch's pictures, one after another, in window order; attention's plans among it."""

    window_order: torch.Tensor  # int64 [units]
    window_places: torch.Tensor  # int64 [units]
    coordinates: torch.Tensor  # int64 [patches, 2]
    full: Any
    windows: Any


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, scale: Normalization) -> None:
        super().__init__()
        self._config = config
        self._window_patches = (config.window_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config, scale)
        self.rotary_emb = AxialRotaryEmbedding(config.hidden_size // config.num_heads, config.rope_theta)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self._tables = lru_cache(maxsize=_GRIDS_KEPT)(self._make_tables)

    def lay_out(
        self, grids: Sequence[GridTHW], attention: VarlenAttention, num_patches: int | None
    ) -> TowerLayout | None:
        """See `interface.Model.lay_out_images`."""
        tables = [self._tables(height, width) for _, height, width in grids]
        seqlens = [height * width for _, height, width in grids]
        window_seqlens = [length for t in tables for length in t.window_seqlens]
        orders = [t.window_order for t in tables], [t.window_places for t in tables]
        coordinates = [t.coordinates for t in tables]
        device = coordinates[0].device
        room = window_room = None
        if num_patches is not None:
            room = SegmentRoom(_MOST_PICTURES, num_patches)
            window_room = SegmentRoom(num_patches // _PATCHES_PER_WINDOW + _MOST_PICTURES, self._window_patches)
            padding = num_patches - sum(seqlens)
            if padding < 0 or len(seqlens) > room.num_segments or len(window_seqlens) > window_room.num_segments:
                return None
            units = torch.arange(padding // self._config.spatial_merge_size**2, device=device)
            for order in orders:
                order.append(units)
            coordinates.append(coordinates[0].new_zeros(padding, 2))
        return TowerLayout(
            window_order=_concatenate(orders[0]),
            window_places=_concatenate(orders[1]),
            coordinates=torch.cat(coordinates),
            full=attention.plan_varlen(seqlens, device, room),
            windows=attention.plan_varlen(window_seqlens, device, window_room),
        )

    def forward(self, patches: torch.Tensor, layout: TowerLayout, attention: VarlenAttention) -> torch.Tensor:
        """`patches` uint8 [sum of patches, patch_numbers], each picture's in merge-unit order (row and column of the unit, then
        row and column inside it). Returns [sum of units, out_hidden_size], units in the same order."""
        rope = self.rotary_emb(layout.coordinates)
        residual = self.patch_embed(patches, layout.window_order)
        norms: list[Any] = [*(block.norm1 for block in self.blocks), self.merger.ln_q]
        hidden = norms[0](residual)
        for index, (block, next_norm) in enumerate(zip(self.blocks, norms[1:], strict=True)):
            plan = layout.full if index in self._config.fullatt_block_indexes else layout.windows
            hidden, residual = block(hidden, residual, rope, attention, plan, next_norm)
        return self.merger(hidden).index_select(0, layout.window_places)

    def _make_tables(self, height: int, width: int) -> GridTables:
        merge = self._config.spatial_merge_size
        window = self._config.window_size // merge // self._config.patch_size  # units along a window's side
        rows, columns = height // merge, width // merge
        row, column = (axis.ravel() for axis in np.indices((rows, columns)))
        windows_across = -(-columns // window)
        window_of_unit = row // window * windows_across + column // window
        order = np.argsort(window_of_unit, kind="stable")
        inside = np.indices((merge, merge)).reshape(2, -1).T  # a unit's patches, by row and column
        corners = np.stack((row, column), axis=-1)[order] * merge
        coordinates = (corners[:, None] + inside).reshape(-1, 2)
        units_in_window = np.bincount(window_of_unit)
        device = self.patch_embed.weight.device
        return GridTables(
            window_order=_upload(order, device),
            window_places=_upload(np.argsort(order), device),
            coordinates=_upload(coordinates, device),
            window_seqlens=tuple((units_in_window * merge**2).tolist()),
        )


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it is at."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _concatenate(orders: list[torch.Tensor]) -> torch.Tensor:
    """Permutations one after another, each moved past those before it."""
    start, moved = 0, []
    for order in orders:
        moved.append(order + start if start else order)
        start += order.shape[0]
    return torch.cat(moved)
