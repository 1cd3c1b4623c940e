"""The backend contract, one suite for every backend: against attention written out token by token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mmv1.errors import ConfigError
from mmv1.runner.attention import make_backend
from mmv1.runner.attention.backend import AttentionBackend, AttentionMetadata, PagedAttention

BLOCK_SIZE, NUM_BLOCKS, HEADS, KV_HEADS, DIM, SCALE = 4, 64, 6, 2, 8, 0.3


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["sdpa"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return make_backend(request.param)


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query [H, D] over keys and values [S, KV, D]."""
    keys, values = (x.repeat_interleave(HEADS // keys.shape[1], dim=1) for x in (keys, values))
    weights = (torch.einsum("hd,shd->hs", query, keys) * SCALE).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)


# (tokens before the step, tokens in it) for each request.
STEPS = [
    [(0, 1)], [(0, 9)], [(7, 1)], [(7, 5)], [(3, 1), (20, 1), (1, 1), (0, 1)], [(0, 3), (5, 1), (8, 8), (30, 1), (4, 2), (15, 1)],
    [(4, 4), (0, 4), (0, 16), (12, 1)],
    # A chunk whose last query is alone in a tile of 64: a kernel of torch's got that one wrong on a GPU.
    [(6, 65)], [(4, 129), (2, 1)], [(5, 64)], [(5, 66)], [(0, 65)],
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_paged_attention(backend: AttentionBackend, step: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    computed, query_lens = (np.array(column, dtype=np.int64) for column in zip(*step, strict=True))
    seq_lens = computed + query_lens
    num_tokens = int(query_lens.sum())
    free = (torch.randperm(NUM_BLOCKS - 1) + 1).tolist()
    tables = [[free.pop() for _ in range(-(-int(n) // BLOCK_SIZE))] for n in seq_lens]
    width = max(map(len, tables))
    # Whatever lies elsewhere in the cache is finite, and must not matter.
    kv_cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, DIM) * 100
    history = [torch.randn(2, int(n), KV_HEADS, DIM) for n in seq_lens]
    slots, queries, expected = [], torch.randn(num_tokens, HEADS, DIM), []
    start = 0
    for table, past, before, length in zip(tables, history, computed, query_lens, strict=True):
        places = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(before + length)]
        kv_cache.flatten(1, 2)[:, places[:before]] = past[:, :before]
        slots += places[before:]
        for i in range(length):
            seen = past[:, : before + i + 1]
            expected.append(naive(queries[start + i], seen[0], seen[1]))
        start += length
    keys, values = (torch.cat([past[i, before:] for past, before in zip(history, computed, strict=True)]) for i in (0, 1))
    metadata = AttentionMetadata(
        query_lens=query_lens,
        seq_lens=seq_lens,
        query_start_loc=torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32),
        seq_lens_device=torch.from_numpy(seq_lens).int().to(DEVICE),
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        block_size=BLOCK_SIZE,
    )
    other_layer = torch.zeros_like(kv_cache)
    attention = PagedAttention(backend, [other_layer, kv_cache], metadata)
    torch.testing.assert_close(attention(1, queries, keys, values, SCALE), torch.stack(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kv_cache.flatten(1, 2)[0, slots], keys)
    torch.testing.assert_close(kv_cache.flatten(1, 2)[1, slots], values)
    assert not other_layer.any()


@pytest.mark.parametrize("seqlens", [[5], [1, 1, 1], [4, 4, 2, 4, 2, 1], [16, 4, 16, 9]], ids=str)
def test_varlen_attention(backend: AttentionBackend, seqlens: list[int]) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, sum(seqlens), HEADS, DIM)
    plan = backend.plan_varlen(seqlens, query.device)
    expected, start = [], 0
    for length in seqlens:
        segment = slice(start, start + length)
        expected += [naive(q, key[segment], value[segment]) for q in query[segment]]
        start += length
    torch.testing.assert_close(backend.varlen(query, key, value, plan, SCALE), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention backend 'abacus'; there are: sdpa"):
        make_backend("abacus")
