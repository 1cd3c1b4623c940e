"""The vision tower whose layers all attend over the whole picture: Qwen2-VL's and, with more to it, Qwen3-VL's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmv1.config import Normalization
from mmv1.errors import ConfigError
from mmv1.kernels import ops_for
from mmv1.models.interface import GridTHW, SegmentRoom, VarlenAttention
from mmv1.models.layers.linear import empty_parameter
from mmv1.models.layers.mlp import PlainMLP
from mmv1.models.layers.norm import LayerNorm
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


class GridTables(NamedTuple):
    """What follows from a picture's grid alone."""

    coordinates: torch.Tensor  # int64 [patches, 2]
    taps: torch.Tensor  # int64 [patches, 4]: rows of the table of positions, [patches, 0] without one
    tap_weights: torch.Tensor  # float32, as many


class FullAttentionLayout(NamedTuple):
    """What the tower must know of a batch's pictures, one after another; attention's plan among it."""

    order: torch.Tensor  # int64 [units]: as they come
    tables: GridTables
    plan: Any


class FullAttentionTower(nn.Module):
    """A tower of pre-norm layers that attend over the whole picture.

    `num_positions`: learned position embeddings, a square table that is stretched over each picture (bilinear, corners on
    corners); 0: none. `levels`: layers after which the stream is merged too, as further levels of a token's embedding
    (DeepStack; Meng et al., 2024).
    """

    def __init__(
        self,
        config: VisionConfig,
        scale: Normalization,
        activation: Callable[[torch.Tensor], torch.Tensor],
        *,
        patch_bias: bool = False,
        num_positions: int = 0,
        levels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if list(levels) != sorted(set(levels)) or max(levels, default=0) >= config.depth:
            raise ConfigError(f"config.json: deepstack_visual_indexes {list(levels)} must name layers, in order")
        self.config = config
        self.embedding_width = (1 + len(levels)) * config.out_hidden_size
        self.patch_embed = PatchEmbed(config, scale, bias=patch_bias)
        self._side = int(num_positions**0.5)
        self.pos_embed = PositionTable(self._side**2, config.hidden_size) if num_positions else None
        self.rotary_emb = AxialRotaryEmbedding(config.hidden_size // config.num_heads, config.rope_theta)
        self.blocks = nn.ModuleList(
            VisionBlock(config, LayerNorm, PlainMLP(config.hidden_size, config.intermediate_size, activation))
            for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, LayerNorm)
        self._levels = {layer: place for place, layer in enumerate(levels)}
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(config, LayerNorm, norms_merged=True) for _ in levels)
        self._tables = GridCache(self._make_tables)

    def lay_out(
        self, grids: Sequence[GridTHW], attention: VarlenAttention, num_patches: int | None
    ) -> FullAttentionLayout | None:
        """See `interface.Model.lay_out_images`."""
        seqlens = [height * width for _, height, width in grids]
        tables = [self._tables(height, width) for _, height, width in grids]
        device, room, padding = self.patch_embed.weight.device, None, 0
        if num_patches is not None:
            room = SegmentRoom(MOST_PICTURES, num_patches)
            padding = num_patches - sum(seqlens)
            if padding < 0 or len(seqlens) > room.num_segments:
                return None
        num_units = (sum(seqlens) + padding) // self.config.spatial_merge_size**2
        return FullAttentionLayout(
            order=torch.arange(num_units, device=device),
            tables=GridTables(*(F.pad(torch.cat(column), (0, 0, 0, padding)) for column in zip(*tables, strict=True))),
            plan=attention.plan_varlen(seqlens, device, room),
        )

    def forward(self, patches: torch.Tensor, layout: FullAttentionLayout, attention: VarlenAttention) -> torch.Tensor:
        """`patches` uint8 [sum of patches, patch_numbers], each picture's in merge-unit order (row and column of the unit, then
        row and column inside it). Returns [sum of units, embedding_width], units in the same order."""
        rope = self.rotary_emb(layout.tables.coordinates)
        residual = self.patch_embed(patches, layout.order)
        if self.pos_embed is not None:
            residual = self.pos_embed(residual, layout.tables)
        norms: list[Any] = [*(block.norm1 for block in self.blocks), self.merger.norm]
        hidden, levels = norms[0](residual), [residual] * len(self._levels)
        for index, (block, next_norm) in enumerate(zip(self.blocks, norms[1:], strict=True)):
            hidden, residual = block(hidden, residual, rope, attention, layout.plan, next_norm)
            if (place := self._levels.get(index)) is not None:
                merger: Any = self.deepstack_merger_list[place]
                levels[place] = merger(merger.normed(residual))
        merged = self.merger(hidden)
        return torch.cat([merged, *levels], dim=1) if levels else merged

    def _make_tables(self, height: int, width: int) -> GridTables:
        coordinates = patch_coordinates(height, width, self.config.spatial_merge_size)
        taps, weights = np.empty((len(coordinates), 0), dtype=np.int64), np.empty((len(coordinates), 0), dtype=np.float32)
        if self.pos_embed is not None:
            taps, weights = interpolation_taps(coordinates, (height, width), self._side)
        device = self.patch_embed.weight.device
        return GridTables(upload(coordinates, device), upload(taps, device), upload(weights, device))


class PositionTable(nn.Module):
    """Learned embeddings of a square's places, `weight` [places, hidden_size]."""

    def __init__(self, num_places: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = empty_parameter(num_places, hidden_size)

    def forward(self, patches: torch.Tensor, tables: GridTables) -> torch.Tensor:
        """`patches` [N, hidden_size] with the embeddings of their places added."""
        return ops_for(patches.device).add_interpolated(patches, self.weight, tables.taps, tables.tap_weights)


def interpolation_taps(coordinates: np.ndarray, grid: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation in a `side` x `side` table stretched over a grid of (height, width) patches, corner on corner, for
    `coordinates` [N, 2]: the four rows of the table around each, int64 [N, 4], and their weights, float32 [N, 4], computed in
    float32 as transformers does."""
    rows, weights = [], []
    for axis, size in enumerate(grid):
        place = coordinates[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        below = np.floor(place)
        rows.append(np.minimum(np.stack((below, below + 1), axis=1).astype(np.int64), side - 1))
        nearness = 1 - (place - below)
        weights.append(np.stack((nearness, 1 - nearness), axis=1))
    taps = rows[0][:, :, None] * side + rows[1][:, None, :]
    return taps.reshape(-1, 4), (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)
