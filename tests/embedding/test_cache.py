"""The cache of embeddings: bounded in bytes, least recently used first out."""

from __future__ import annotations

import random

from mmv1.embedding.cache import _ENTRY_BYTES, EmbeddingCache


def test_the_least_recently_used_go_first() -> None:
    cache = EmbeddingCache(3 * (_ENTRY_BYTES + 8))
    for key in b"abc":
        cache.put(bytes([key]), bytes([key]) * 8)
    assert cache.get(b"a") == b"a" * 8
    cache.put(b"d", b"d" * 8)
    assert cache.get(b"b") is None and [cache.get(key) is not None for key in (b"a", b"c", b"d")] == [True] * 3
    cache.clear()
    assert (len(cache), cache.num_bytes, cache.get(b"a")) == (0, 0, None)


def test_it_never_holds_more_than_it_may() -> None:
    rng = random.Random(1)
    cache, kept = EmbeddingCache(20_000), {}
    for _ in range(2000):
        key = bytes([rng.randrange(200)])
        values = kept.setdefault(key, rng.randbytes(rng.choice((0, 128, 2048))))
        assert cache.get(key) in (None, values)
        cache.put(key, values)
        assert cache.get(key) == values
        assert cache.num_bytes == sum(len(v) + _ENTRY_BYTES for v in cache._entries.values()) <= cache.capacity_bytes
    assert 5 < len(cache) < 200


def test_what_is_larger_than_the_cache_is_not_kept_and_costs_nothing_that_is() -> None:
    cache = EmbeddingCache(_ENTRY_BYTES + 100)
    cache.put(b"a", b"x" * 100)
    cache.put(b"b", b"x" * 101)
    assert cache.get(b"a") is not None and cache.get(b"b") is None
    empty = EmbeddingCache(0)
    empty.put(b"a", b"")
    assert len(empty) == 0
