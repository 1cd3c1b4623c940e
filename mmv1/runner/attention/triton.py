"""Our own kernels: paged attention by tiles, and attention inside segments. Triton is imported with the first backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from mmv1.models.interface import SegmentRoom
from mmv1.runner.attention.backend import AttentionMetadata, upload

_CHUNK_TILE = 128  # tokens of a tile of a chunk
_SMALL_TILE_ROWS = 16  # the fewest query rows a product on tensor cores takes
_MAX_SPLITS = 64
_KEYS_PER_SPLIT = 128  # at least, else the sum of the parts costs more than is won
# Small tiles read a request's keys once per tile of a few tokens. Beyond as many keys in a step, the chunks of it taken together,
# that is no longer little beside the rest of the step.
_MAX_TILE_KEYS = 400_000
# A step's attention ends with its longest program, which takes some 40 ns a key. Where a request is so much longer than the
# others that it would make one, all keys are read in more parts.
_UNEVEN_SPLITS = 16
_MAX_UNEVEN_KEYS = 2048  # of one program, whatever the others have
_MOST_UNEVEN = 1.25  # times the mean
# Beside large chunks the keys of a recorded decode are not split: how many decodes there will be is not known.
_MAX_UNSPLIT_KEYS = 3072
_PROGRAMS_PER_SM = 3


class TilePlan(NamedTuple):
    """A step as tiles: some tokens of one request each. Made anew for a step, or over tensors that a recorded step reads."""

    tiles: torch.Tensor  # int32 [4, n]: row of block_table, first token in the step, tokens (0: none), its index in the request
    block_table: torch.Tensor  # int32 [rows, blocks]
    block_size: int
    tokens_per_tile: int
    num_splits: int
    output: torch.Tensor | None = None  # [T, H, D], where the result goes; None: into memory of its own


def make_tiles(
    rows: np.ndarray,
    starts: np.ndarray,
    query_lens: np.ndarray,
    computed: np.ndarray,
    tokens_per_tile: int,
    num_tiles: int | None = None,
) -> np.ndarray:
    """The tiles of R requests, int32 [4, n]: each request's tokens cut every `tokens_per_tile`, zeros up to `num_tiles`.

    All int64 [R]: row in the block table, first token in the step, tokens in the step, tokens computed before it. Raises
    ValueError when `num_tiles` are too few.
    """
    counts = -(-query_lens // tokens_per_tile)
    ends = np.cumsum(counts)
    needed = int(ends[-1]) if len(ends) else 0
    if num_tiles is None:
        num_tiles = needed
    elif num_tiles < needed:
        raise ValueError(f"{needed} tiles are needed, there is room for {num_tiles}")
    request = np.repeat(np.arange(len(rows)), counts)
    first = (np.arange(needed) - np.repeat(ends - counts, counts)) * tokens_per_tile  # of the request's tokens in the step
    tiles = np.zeros((4, num_tiles), dtype=np.int32)
    tiles[0, :needed] = rows[request]
    tiles[1, :needed] = starts[request] + first
    tiles[2, :needed] = np.minimum(query_lens[request] - first, tokens_per_tile)
    tiles[3, :needed] = computed[request] + first
    return tiles


def small_tile_tokens(group: int) -> int:
    """Tokens that fill the smallest tile with the `group` query heads of one key head."""
    return max(1, _SMALL_TILE_ROWS // group)


def choose_num_splits(num_tiles: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """Parts in which the keys of every tile are read: enough to keep the device busy, none shorter than is worth it at
    `max_seq_len` tokens. Depends on nothing on the device, so the grid of a recorded launch stands for good."""
    wanted = _PROGRAMS_PER_SM * num_sms // (num_tiles * num_kv_heads)
    return max(1, min(wanted, max_seq_len // _KEYS_PER_SPLIT, _MAX_SPLITS))


class TileLayout:
    """A recorded step as small tiles, whatever its mix of decodes and chunks. `output`: see `AttentionBackend.layout`."""

    def __init__(
        self,
        num_tiles: int,
        block_table: torch.Tensor,
        block_size: int,
        tokens_per_tile: int,
        num_splits: int,
        output: torch.Tensor,
        takes_uneven: bool = True,
    ) -> None:
        """`takes_uneven`: steps with a request far longer than the others too; False where there is a better layout for them."""
        self.num_numbers = 4 * num_tiles
        self._takes_uneven = takes_uneven
        self._plan = TilePlan(torch.empty(0), block_table, block_size, tokens_per_tile, num_splits, output)

    def fits(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> bool:
        chunks, num_splits = query_lens > 1, self._plan.num_splits
        num_chunk_keys = int((-(-query_lens[chunks] // self._plan.tokens_per_tile) * seq_lens[chunks]).sum())
        is_even = seq_lens.max() <= max(_MAX_UNEVEN_KEYS * num_splits, _MOST_UNEVEN * seq_lens.mean())
        return num_chunk_keys <= _MAX_TILE_KEYS and bool(self._takes_uneven or is_even)

    def write(self, numbers: np.ndarray, rows: np.ndarray, query_lens: np.ndarray, computed: np.ndarray) -> None:
        tiles = numbers.reshape(4, -1)
        starts = np.cumsum(query_lens) - query_lens
        tiles[:] = make_tiles(rows, starts, query_lens, computed, self._plan.tokens_per_tile, num_tiles=tiles.shape[1])

    def plan(self, numbers: torch.Tensor) -> TilePlan:
        return self._plan._replace(tiles=numbers.view(4, -1))


def tile_layouts(
    num_tiles: int, num_kv_heads: int, block_table: torch.Tensor, block_size: int, output: torch.Tensor
) -> list[TileLayout]:
    """For a recorded step of as many tokens, the best first: a second one, for requests of very different lengths, where the
    first reads their keys in few parts and the longest that there can be has many."""
    most_keys = block_table.shape[1] * block_size
    tokens = small_tile_tokens(output.shape[1] // num_kv_heads)
    splits = choose_num_splits(num_tiles, num_kv_heads, most_keys, num_multiprocessors(output.device))
    if 2 * splits > _UNEVEN_SPLITS or most_keys <= splits * _MAX_UNEVEN_KEYS:
        return [TileLayout(num_tiles, block_table, block_size, tokens, splits, output)]
    even = TileLayout(num_tiles, block_table, block_size, tokens, splits, output, takes_uneven=False)
    return [even, TileLayout(num_tiles, block_table, block_size, tokens, _UNEVEN_SPLITS, output)]


class _StepPlan(NamedTuple):
    """A step of any size: its single tokens and its longer chunks, in tiles that suit them."""

    decodes: TilePlan | None
    longest: int  # of the decodes, in tokens of the request; 0: their keys are not split
    chunks: TilePlan | None
    output: torch.Tensor | None = None  # as a TilePlan's


class StepLayout:
    """A recorded step whose single tokens and longer chunks have tiles of their own. `output`: see `AttentionBackend.layout`."""

    def __init__(self, most_requests: int, block_table: torch.Tensor, block_size: int, output: torch.Tensor) -> None:
        # A request's last tile may be of a few tokens only.
        self._num_tiles = most_requests, len(output) // _CHUNK_TILE + most_requests
        self.num_numbers = 4 * sum(self._num_tiles)
        self._most_requests = most_requests
        self._block_table, self._block_size, self._output = block_table, block_size, output

    def fits(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> bool:
        longest = seq_lens[query_lens == 1].max(initial=0)
        return len(query_lens) <= self._most_requests and bool(longest <= _MAX_UNSPLIT_KEYS)

    def write(self, numbers: np.ndarray, rows: np.ndarray, query_lens: np.ndarray, computed: np.ndarray) -> None:
        starts = np.cumsum(query_lens) - query_lens
        parts = np.split(numbers, [4 * self._num_tiles[0]])
        for part, chosen, tokens in zip(parts, (query_lens == 1, query_lens > 1), (1, _CHUNK_TILE), strict=True):
            columns = rows[chosen], starts[chosen], query_lens[chosen], computed[chosen]
            tiles = part.reshape(4, -1)
            tiles[:] = _longest_first(make_tiles(*columns, tokens, num_tiles=tiles.shape[1]))

    def plan(self, numbers: torch.Tensor) -> _StepPlan:
        decodes, chunks = numbers.split([4 * count for count in self._num_tiles])
        shared = self._block_table, self._block_size
        return _StepPlan(
            decodes=TilePlan(decodes.view(4, -1), *shared, tokens_per_tile=1, num_splits=1),
            longest=0,
            chunks=TilePlan(chunks.view(4, -1), *shared, tokens_per_tile=_CHUNK_TILE, num_splits=1),
            output=self._output,
        )


def _longest_first(tiles: np.ndarray) -> np.ndarray:
    """Tiles in the order in which they should begin: those that see most keys take longest."""
    return np.take(tiles, np.argsort(-tiles[3], kind="stable"), axis=1)


class SegmentPlan(NamedTuple):
    kernel: torch.Tensor  # segments or their tiles, for our kernels
    cu_seqlens: torch.Tensor | None  # int32 [segments + 1] where FlashAttention may serve: long ones on CUDA
    longest: int


class TritonBackend:
    """Long segments go to torch's varlen_attn (FlashAttention 2) where it can take them, as it is faster there."""

    name = "triton"

    def __init__(self) -> None:
        from mmv1.kernels import paged_attention, varlen_attention

        self._paged = paged_attention
        self._varlen = varlen_attention
        self.max_window = varlen_attention.MAX_WINDOW

    def plan(self, metadata: AttentionMetadata) -> _StepPlan:
        query_lens, seq_lens = metadata.query_lens, metadata.seq_lens
        single = np.flatnonzero(query_lens == 1)
        longer = np.flatnonzero(query_lens > 1)
        return _StepPlan(
            decodes=self._tiles(metadata, single, 1),
            longest=int(seq_lens[single].max()) if len(single) else 0,
            chunks=self._tiles(metadata, longer, _CHUNK_TILE),
        )

    @staticmethod
    def _tiles(metadata: AttentionMetadata, requests: np.ndarray, tokens_per_tile: int) -> TilePlan | None:
        """Tiles of some requests of the step."""
        if not len(requests):
            return None
        query_lens = metadata.query_lens[requests]
        starts = (np.cumsum(metadata.query_lens) - metadata.query_lens)[requests]
        computed = metadata.seq_lens[requests] - query_lens
        tiles = make_tiles(metadata.host_rows[requests], starts, query_lens, computed, tokens_per_tile)
        on_device = upload(_longest_first(tiles), metadata.block_table.device)
        return TilePlan(on_device, metadata.block_table, metadata.block_size, tokens_per_tile, num_splits=1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        plan: _StepPlan | TilePlan,
        scale: float,
    ) -> torch.Tensor:
        """Of a TilePlan too. Tokens in no tile of it have an undefined result."""
        output = query.new_empty(query.shape) if plan.output is None else plan.output
        if isinstance(plan, TilePlan):
            self._attend(query, kv_cache, plan, scale, output)
            return output
        if plan.decodes is not None:
            num_tiles, num_sms = plan.decodes.tiles.shape[1], num_multiprocessors(query.device)
            num_splits = choose_num_splits(num_tiles, kv_cache.shape[3], plan.longest, num_sms)
            self._attend(query, kv_cache, plan.decodes._replace(num_splits=num_splits), scale, output)
        if plan.chunks is not None:
            self._attend(query, kv_cache, plan.chunks, scale, output)
        return output

    def layout(self, most_requests: int, block_table: torch.Tensor, block_size: int, output: torch.Tensor) -> StepLayout:
        return StepLayout(most_requests, block_table, block_size, output)

    def _attend(self, query: torch.Tensor, kv_cache: torch.Tensor, plan: TilePlan, scale: float, output: torch.Tensor) -> None:
        self._paged.paged_attention(
            query,
            kv_cache,
            plan.tiles,
            plan.block_table,
            scale,
            block_size=plan.block_size,
            tokens_per_tile=plan.tokens_per_tile,
            num_splits=plan.num_splits,
            output=output,
        )

    def plan_varlen(self, seqlens: Sequence[int], device: torch.device, room: SegmentRoom | None = None) -> SegmentPlan:
        num_segments, longest = room or (None, max(seqlens))
        segments = upload(self._varlen.make_segments(seqlens, longest, num_segments), device)
        long_on_cuda = device.type == "cuda" and longest > self.max_window
        return SegmentPlan(segments, cumulative(seqlens, device, num_segments) if long_on_cuda else None, longest)

    def varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: SegmentPlan, scale: float
    ) -> torch.Tensor:
        if plan.cu_seqlens is None or query.dtype == torch.float32 or query.shape[-1] % 8:
            return self._varlen.varlen_attention(query, key, value, plan.kernel, scale)
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(query, key, value, plan.cu_seqlens, plan.cu_seqlens, plan.longest, plan.longest, scale=scale)
        return cast(torch.Tensor, attended)


def cumulative(seqlens: Sequence[int], device: torch.device, num_segments: int | None = None) -> torch.Tensor:
    """int32 [segments + 1]: where each begins, and the end; up to `num_segments` with empty ones."""
    ends = np.concatenate([[0], np.cumsum(seqlens)]).astype(np.int32)
    return upload(ends if num_segments is None else np.pad(ends, (0, num_segments + 1 - len(ends)), mode="edge"), device)


def num_multiprocessors(device: torch.device) -> int:
    """Of a CPU, which interprets the kernels: 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
