"""What vision towers are made of, and the tower whose layers all attend over the whole picture.

uint8 patches go in, embeddings of picture tokens come out, many pictures in one call. Whatever depends only on a picture's grid
is made once and kept on the device. Grids are Python ints on the host: nothing here reads the device back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmv1.config import Normalization, positive_number, section, whole_number
from mmv1.errors import ConfigError
from mmv1.kernels import ops_for
from mmv1.models.interface import GridTHW, SegmentRoom, VarlenAttention
from mmv1.models.layers.linear import Linear, aligned_size, empty_parameter
from mmv1.models.layers.mlp import PlainMLP
from mmv1.models.layers.norm import LayerNorm, RMSNorm
from mmv1.models.layers.rotary import AxialRotaryEmbedding, Rope
from mmv1.models.weights import Piece

NORM_EPS = 1e-6
GRIDS_KEPT = 256  # tables of at most a few hundred KiB each
MOST_PICTURES = 32  # in a padded layout

Norm = RMSNorm | LayerNorm


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
    def read(cls, vision: Mapping[str, Any], *, hidden_size: int, intermediate_size: int, out_hidden_size: int) -> VisionConfig:
        """`vision`: config.json's vision_config; the sizes are those that families spell differently. Raises ConfigError."""
        num_heads = whole_number(vision, "num_heads")
        if hidden_size % (4 * num_heads):
            raise ConfigError(f"config.json: a head of the vision tower must have a multiple of 4 numbers: {hidden_size} "
                              f"for {num_heads} heads")
        return cls(
            depth=whole_number(vision, "depth"),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=num_heads,
            out_hidden_size=out_hidden_size,
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


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it is at."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
        self._tables = lru_cache(maxsize=GRIDS_KEPT)(self._make_tables)

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
        above = place - below
        weights.append(np.stack((1 - above, above), axis=1))
    taps = rows[0][:, :, None] * side + rows[1][:, None, :]
    return taps.reshape(-1, 4), (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)
