"""Qwen2.5-VL (Qwen2.5-VL technical report, 2025): a tower whose attention runs inside windows of the picture in most layers and
over the whole picture in a few, before the Qwen2 language model with M-RoPE.

Patches are put in window order once, before the first layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mmv1.config import Normalization, whole_number, whole_numbers
from mmv1.errors import ConfigError
from mmv1.models.interface import GridTHW, SegmentRoom, VarlenAttention
from mmv1.models.language_model import LanguageModel
from mmv1.models.layers.mlp import GatedMLP
from mmv1.models.layers.norm import RMSNorm
from mmv1.models.layers.rotary import AxialRotaryEmbedding
from mmv1.models.layers.vision import (
    MOST_PICTURES,
    GridCache,
    PatchEmbed,
    PatchMerger,
    VisionBlock,
    VisionConfig,
    patch_coordinates,
    upload,
)
from mmv1.models.qwen2_vl import join

_PATCHES_PER_WINDOW = 32  # room in a padded layout: windows at a picture's borders are not full, so there are more


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    return join(hf_config, model_dir, VisionTower.from_hf)


class GridTables(NamedTuple):
    """What follows from a picture's grid alone."""

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
    def __init__(self, config: VisionConfig, scale: Normalization, *, window_size: int, full_layers: frozenset[int]) -> None:
        """`window_size` in pixels; `full_layers`: those that attend over the whole picture."""
        super().__init__()
        if window_size < config.patch_size * config.spatial_merge_size:
            raise ConfigError(f"config.json: window_size {window_size} is smaller than a picture token")
        self.config = config
        self.embedding_width = config.out_hidden_size
        self._window_units = window_size // config.spatial_merge_size // config.patch_size  # along a side
        self._window_patches = (window_size // config.patch_size) ** 2
        self._full_layers = full_layers
        self.patch_embed = PatchEmbed(config, scale, bias=False)
        self.rotary_emb = AxialRotaryEmbedding(config.hidden_size // config.num_heads, config.rope_theta)
        self.blocks = nn.ModuleList(
            VisionBlock(config, RMSNorm, GatedMLP(config.hidden_size, config.intermediate_size, bias=True))
            for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, RMSNorm)
        self._tables = GridCache(self._make_tables)

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], scale: Normalization) -> VisionTower:
        """`vision`: config.json's vision_config, whose names are the same in both dialects but for the rope's."""
        if vision.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"the vision tower's hidden_act '{vision['hidden_act']}' is not supported, only 'silu'")
        return cls(
            VisionConfig.read(vision),
            scale,
            window_size=whole_number(vision, "window_size"),
            full_layers=frozenset(whole_numbers(vision, "fullatt_block_indexes")),
        )

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
            room = SegmentRoom(MOST_PICTURES, num_patches)
            window_room = SegmentRoom(num_patches // _PATCHES_PER_WINDOW + MOST_PICTURES, self._window_patches)
            padding = num_patches - sum(seqlens)
            if padding < 0 or len(seqlens) > room.num_segments or len(window_seqlens) > window_room.num_segments:
                return None
            units = torch.arange(padding // self.config.spatial_merge_size**2, device=device)
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
        norms: list[Any] = [*(block.norm1 for block in self.blocks), self.merger.norm]
        hidden = norms[0](residual)
        for index, (block, next_norm) in enumerate(zip(self.blocks, norms[1:], strict=True)):
            plan = layout.full if index in self._full_layers else layout.windows
            hidden, residual = block(hidden, residual, rope, attention, plan, next_norm)
        return self.merger(hidden).index_select(0, layout.window_places)

    def _make_tables(self, height: int, width: int) -> GridTables:
        merge, side = self.config.spatial_merge_size, self._window_units
        row, column = (axis.ravel() for axis in np.indices((height // merge, width // merge)))
        windows_across = -(-(width // merge) // side)
        window_of_unit = row // side * windows_across + column // side
        order = np.argsort(window_of_unit, kind="stable")
        device = self.patch_embed.weight.device
        return GridTables(
            window_order=upload(order, device),
            window_places=upload(np.argsort(order), device),
            coordinates=upload(patch_coordinates(height, width, merge, order), device),
            window_seqlens=tuple((np.bincount(window_of_unit) * merge**2).tolist()),
        )


def _concatenate(orders: list[torch.Tensor]) -> torch.Tensor:
    """Permutations one after another, each moved past those before it."""
    start, moved = 0, []
    for order in orders:
        moved.append(order + start if start else order)
        start += order.shape[0]
    return torch.cat(moved)
