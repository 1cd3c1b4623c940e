"""The embeddings' slab: what is stored comes back, pages go round, and a broken promise is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmv1.encoder_cache.tensors import EncoderCacheTensors
from mmv1.errors import EngineError
from mmv1.step import ENCODER_CACHE_PAGE_ROWS as PAGE

WIDTH = 4


def make_cache(pages: int) -> EncoderCacheTensors:
    return EncoderCacheTensors(pages * PAGE * WIDTH * 4 + 7, WIDTH, torch.float32, torch.device("cpu"))


def test_random_traffic_keeps_every_embedding_whole() -> None:
    rng = np.random.default_rng(0)
    cache, held, free = make_cache(12), {}, 12
    for i in range(300):
        num_tokens = int(rng.integers(1, 4 * PAGE))
        while -(-num_tokens // PAGE) > free:
            victim = sorted(held)[int(rng.integers(len(held)))]
            free += -(-len(held.pop(victim)) // PAGE)
            cache.free([victim])
        mm_hash, embedding = i.to_bytes(32, "little"), torch.from_numpy(rng.random((num_tokens, WIDTH), dtype=np.float32))
        cache.write(torch.from_numpy(cache.allocate(mm_hash, num_tokens)), embedding)
        held[mm_hash] = embedding
        free -= -(-num_tokens // PAGE)
        assert (cache.num_free_pages, len(cache)) == (free, len(held))
        for other, expected in held.items():
            start = int(rng.integers(len(expected)))
            stop = int(rng.integers(start, len(expected))) + 1
            assert torch.equal(cache.slab[cache.rows(other, start, stop)], expected[start:stop])


def test_broken_promises_are_said() -> None:
    cache = make_cache(2)
    cache.allocate(b"a", PAGE + 1)
    with pytest.raises(EngineError, match="cannot take 1 pages"):
        cache.allocate(b"b", 1)
    with pytest.raises(EngineError, match="does not hold"):
        cache.rows(b"b", 0, 1)
    with pytest.raises(EngineError, match="does not hold"):
        cache.free([b"b"])
    cache.free([b"a"])
    cache.allocate(b"b", 2 * PAGE)
