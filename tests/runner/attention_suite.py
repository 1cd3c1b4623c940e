"""The backend contract, one suite for every backend, against attention written out in float32.

A test module imports the tests and gives the fixtures `setting` and `triton_setting`: what runs, where, in which numbers.
Whatever no token of a request has written is NaN in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

import tests.interpreter  # noqa: F401
from mmv1.models.layers.rotary import Rope
from mmv1.runner.attention.backend import AttentionBackend, AttentionMetadata, PagedAttention
from mmv1.runner.attention.triton import TilePlan, make_tiles

SCALE = 0.3
SPARE_ROWS = 3  # of the block table, of requests that are not in the step


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True)
class Setting:
    backend: AttentionBackend
    device: torch.device
    dtype: torch.dtype
    shape: Shape

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """`expected` is float32. Half precision rounds the inputs of both sides alike, the weights and the result only here."""
        atol, rtol = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 4e-3), torch.bfloat16: (2e-2, 2e-2)}[self.dtype]
        torch.testing.assert_close(actual.float(), expected, atol=atol, rtol=rtol)


Step = list[tuple[int, int]]  # (tokens before the step, tokens in it) of each request


@dataclass
class Case:
    """A step and its cache, keys and values of the step's own tokens stored in it."""

    metadata: AttentionMetadata
    query: torch.Tensor  # [T, H, D]
    key: torch.Tensor  # [T, KV, D]
    value: torch.Tensor
    kv_cache: torch.Tensor
    slots: torch.Tensor  # int32 [T]
    expected: torch.Tensor  # float32 [T, H, D]

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        plan = backend.plan(self.metadata)
        return backend.forward(self.query, self.key, self.value, self.kv_cache, plan, SCALE)


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, computed: int | None) -> torch.Tensor:
    """[L, H, D] over [S, KV, D] in float32; query i sees the keys up to computed + i, all of them for None."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = query.float(), keys.float().repeat_interleave(group, 1), values.float().repeat_interleave(group, 1)
    scores = torch.einsum("lhd,shd->hls", query, keys) * SCALE
    if computed is not None:
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(computed + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hls,shd->lhd", scores.softmax(-1), values)


def make_case(setting: Setting, step: Step, shape: Shape | None = None, seed: int = 0) -> Case:
    """Requests' numbers depend on `seed` and on their place in the step."""
    heads, kv_heads, dim, block_size = shape or setting.shape
    device, dtype = setting.device, setting.dtype
    computed, query_lens = (np.array(column, dtype=np.int64) for column in zip(*step, strict=True))
    seq_lens, num_tokens = computed + query_lens, int(query_lens.sum())
    num_blocks = -(-seq_lens // block_size)
    generator = torch.Generator().manual_seed(seed)
    free = (torch.randperm(int(num_blocks.sum()) + 7, generator=generator) + 1).tolist()
    host_rows = torch.randperm(len(step) + SPARE_ROWS, generator=generator)[: len(step)].numpy()
    block_table = torch.full((len(step) + SPARE_ROWS, int(num_blocks.max()) + 2), free[-1], dtype=torch.int32)
    kv_cache = torch.full((2, len(free) + 1, block_size, kv_heads, dim), float("nan"), dtype=dtype)
    query = torch.randn(num_tokens, heads, dim, generator=generator).to(dtype)
    fresh, slots, expected, start = [], [], [], 0
    for row, count, before, length in zip(host_rows, num_blocks, computed, query_lens, strict=True):
        table = torch.tensor([free.pop(0) for _ in range(count)])
        block_table[row, :count] = table
        places = torch.arange(before + length)
        own = table[places // block_size] * block_size + places % block_size
        past = torch.randn(2, int(before + length), kv_heads, dim, generator=generator).to(dtype)
        kv_cache.flatten(1, 2)[:, own] = past
        slots.append(own[before:])
        fresh.append(past[:, before:])
        expected.append(reference(query[start : start + length], past[0], past[1], int(before)))
        start += int(length)
    key, value = torch.cat(fresh, 1).to(device)
    metadata = AttentionMetadata(
        query_lens=query_lens,
        seq_lens=seq_lens,
        query_start_loc=torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32, device=device),
        seq_lens_device=torch.from_numpy(seq_lens).int().to(device),
        rows=torch.from_numpy(host_rows).int().to(device),
        host_rows=host_rows,
        block_table=block_table.to(device),
        block_size=block_size,
    )
    return Case(
        metadata, query.to(device), key, value, kv_cache.to(device), torch.cat(slots).int().to(device),
        torch.cat(expected).to(device),
    )  # fmt: skip


STEPS: list[Step] = [
    [(0, 1)], [(0, 9)], [(7, 1)], [(7, 5)], [(3, 1), (20, 1), (1, 1), (0, 1)], [(0, 3), (5, 1), (8, 8), (30, 1), (4, 2), (15, 1)],
    [(4, 4), (0, 4), (0, 16), (12, 1)], [(15, 1), (16, 1), (17, 1), (63, 1), (64, 1), (65, 1), (200, 1)],
    # A chunk whose last query is alone in a tile of 64: a kernel of torch's got that one wrong on a GPU.
    [(6, 65)], [(4, 129), (2, 1)], [(5, 64)], [(5, 66)], [(0, 65)], [(100, 40), (0, 130), (300, 1)],
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_step(setting: Setting, step: Step) -> None:
    case = make_case(setting, step)
    setting.assert_close(case.run(setting.backend), case.expected)


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 1), (1, 3), (2, 2), (3, 1), (5, 2), (7, 4), (8, 2), (16, 1)])
def test_heads(setting: Setting, group: int, kv_heads: int) -> None:
    shape = Shape(group * kv_heads, kv_heads, *setting.shape[2:])
    case = make_case(setting, [(17, 1), (0, 1), (6, 5)], shape)
    setting.assert_close(case.run(setting.backend), case.expected)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
def test_head_dims(setting: Setting, head_dim: int) -> None:
    shape = setting.shape._replace(head_dim=head_dim)
    case = make_case(setting, [(17, 1), (0, 1), (6, 5)], shape)
    setting.assert_close(case.run(setting.backend), case.expected)


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes(setting: Setting, block_size: int) -> None:
    shape = setting.shape._replace(block_size=block_size)
    case = make_case(setting, [(140, 1), (0, 33), (31, 2)], shape)
    setting.assert_close(case.run(setting.backend), case.expected)


def test_a_request_alone_equals_the_request_among_others(setting: Setting) -> None:
    step = [(40, 1), (0, 20), (9, 3), (0, 1)]
    together = make_case(setting, step)
    results = together.run(setting.backend).split([length for _, length in step])
    starts = [0, *np.cumsum([length for _, length in step])]
    for i, (computed, length) in enumerate(step):
        metadata, tokens = together.metadata, slice(starts[i], starts[i] + length)
        one = AttentionMetadata(
            query_lens=metadata.query_lens[i : i + 1],
            seq_lens=metadata.seq_lens[i : i + 1],
            query_start_loc=torch.tensor([0, length], dtype=torch.int32, device=setting.device),
            seq_lens_device=metadata.seq_lens_device[i : i + 1],
            rows=metadata.rows[i : i + 1],
            host_rows=metadata.host_rows[i : i + 1],
            block_table=metadata.block_table,
            block_size=metadata.block_size,
        )
        plan = setting.backend.plan(one)
        query, key, value = (x[tokens] for x in (together.query, together.key, together.value))
        alone = setting.backend.forward(query, key, value, together.kv_cache, plan, SCALE)
        assert computed + length == metadata.seq_lens[i]
        setting.assert_close(alone, results[i].float())


def test_layers_have_caches_of_their_own_and_keep_what_is_new(setting: Setting) -> None:
    """A layer's attention as a model calls it: rotated by an angle of 0, so that queries and keys are what they were."""
    case = make_case(setting, [(5, 1), (0, 6), (16, 3)])
    dim = case.query.shape[-1]
    wanted = case.kv_cache.flatten(1, 2)[:, case.slots.long()].clone()
    case.kv_cache.flatten(1, 2)[:, case.slots.long()] = float("nan")
    other = torch.zeros_like(case.kv_cache)
    qkv = torch.cat([case.query, case.key, case.value], 1)
    rope = Rope.from_angles(torch.zeros(len(qkv), dim // 2, device=setting.device), setting.dtype)
    backend = setting.backend
    attention = PagedAttention(backend, backend.plan(case.metadata), [other, case.kv_cache], case.slots)
    setting.assert_close(attention(1, qkv, case.key.shape[1], rope, SCALE), case.expected)
    torch.testing.assert_close(case.kv_cache.flatten(1, 2)[:, case.slots.long()], wanted)
    assert not other.any()


def make_tile_plan(case: Case, tokens_per_tile: int, num_splits: int, num_tiles: int | None = None) -> TilePlan:
    metadata = case.metadata
    starts = np.cumsum(metadata.query_lens) - metadata.query_lens
    tiles = make_tiles(
        metadata.host_rows, starts, metadata.query_lens, metadata.seq_lens - metadata.query_lens, tokens_per_tile, num_tiles
    )
    return TilePlan(
        torch.from_numpy(tiles).to(case.query.device), metadata.block_table, metadata.block_size, tokens_per_tile, num_splits
    )


TILED: Step = [(150, 1), (0, 5), (62, 3), (0, 1), (127, 1), (128, 1)]


@pytest.mark.parametrize(
    ("tokens_per_tile", "num_splits"), [(1, 1), (1, 4), (2, 3), (2, 17), (5, 1), (5, 8), (9, 2), (128, 1), (128, 2)]
)
def test_tiles(triton_setting: Setting, tokens_per_tile: int, num_splits: int) -> None:
    """Any size of tile, any number of splits, more than there are steps of keys too."""
    case = make_case(triton_setting, TILED)
    plan = make_tile_plan(case, tokens_per_tile, num_splits)
    result = triton_setting.backend.forward(case.query, case.key, case.value, case.kv_cache, plan, SCALE)
    triton_setting.assert_close(result, case.expected)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padded_tiles_do_nothing(triton_setting: Setting, num_splits: int) -> None:
    """Tokens beyond the step belong to no tile: their places keep what they held, and all others are written."""
    from mmv1.kernels.paged_attention import paged_attention

    case = make_case(triton_setting, TILED)
    plan = make_tile_plan(case, 2, num_splits, num_tiles=20)
    padding = 4
    query = torch.cat([case.query, torch.full_like(case.query[:padding], float("nan"))])
    output = torch.full_like(query, float("nan"))
    paged_attention(
        query, case.kv_cache, plan.tiles, plan.block_table, SCALE,
        block_size=plan.block_size, tokens_per_tile=2, num_splits=num_splits, output=output,
    )  # fmt: skip
    triton_setting.assert_close(output[:-padding], case.expected)
    assert output[-padding:].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 4])
def test_with_a_fixed_grid_others_change_no_bit(triton_setting: Setting, num_splits: int) -> None:
    case = make_case(triton_setting, TILED)
    together = make_tile_plan(case, 2, num_splits)
    backend = triton_setting.backend
    expected = backend.forward(case.query, case.key, case.value, case.kv_cache, together, SCALE)
    for tile in range(together.tiles.shape[1]):
        alone = together._replace(tiles=together.tiles[:, tile : tile + 1])
        result = backend.forward(case.query, case.key, case.value, case.kv_cache, alone, SCALE)
        start, length = together.tiles[1:3, tile].tolist()
        assert torch.equal(result[start : start + length], expected[start : start + length])


SEGMENTS = [
    [5], [1, 1, 1], [4, 4, 2, 4, 2, 1], [16, 4, 16, 9], [64, 64, 32, 16, 48, 4], [8, 8, 24], [65], [64, 65, 3], [130, 1, 200],
]  # fmt: skip


@pytest.mark.parametrize("seqlens", SEGMENTS, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80])
def test_segments(setting: Setting, seqlens: list[int], head_dim: int) -> None:
    """Queries, keys and values lie in one product; those of other segments must not matter."""
    generator = torch.Generator().manual_seed(0)
    heads = 2
    qkv = torch.randn(sum(seqlens), 3 * heads, head_dim, generator=generator).to(setting.device, setting.dtype)
    query, key, value = qkv.split(heads, dim=1)
    plan = setting.backend.plan_varlen(seqlens, setting.device)
    result = setting.backend.varlen(query, key, value, plan, SCALE)
    parts = zip(*(x.split(seqlens) for x in (query, key, value)), strict=True)
    setting.assert_close(result, torch.cat([reference(q, k, v, None) for q, k, v in parts]))


@pytest.mark.parametrize("seqlens", [[16, 4, 30], [70, 3]], ids=str)
def test_a_segment_is_not_touched_by_its_neighbours(setting: Setting, seqlens: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(seqlens), 3 * 2, 64, generator=generator).to(setting.device, setting.dtype)
    plan = setting.backend.plan_varlen(seqlens, setting.device)
    before = setting.backend.varlen(*qkv.split(2, dim=1), plan, SCALE)
    qkv[seqlens[0] : seqlens[0] + seqlens[1]] = 1000.0
    after = setting.backend.varlen(*qkv.split(2, dim=1), plan, SCALE)
    others = [*range(seqlens[0]), *range(seqlens[0] + seqlens[1], sum(seqlens))]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before, after)
