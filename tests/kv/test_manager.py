"""The KV ledger: prefix hits, room, and a property test against a model that holds everything in sets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.block_pool import BlockPool
from mmv1.kv.manager import KVCacheManager
from mmv1.request import Request
from tests.simulation import make_request


def manager(num_blocks: int = 9, block_size: int = 4) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size, BlockHasher(block_size))


def request(name: str, tokens: list[int]) -> Request:
    return Request(make_request(name, tokens), (0,))


def test_a_prefix_survives_its_request() -> None:
    kv = manager()
    first = request("a", list(range(10)))
    ids = kv.allocate(first, 10)
    kv.free(first)
    second = request("b", [*range(8), 99, 98])
    prefix = kv.find_prefix(second)
    assert [block.block_id for block in prefix] == ids[:2]
    assert kv.allocate(second, 10, prefix)[:2] == ids[:2]
    kv.check_integrity()


def test_one_token_is_always_left_to_compute() -> None:
    kv = manager()
    first = request("a", list(range(8)))
    kv.allocate(first, 8)
    assert len(kv.find_prefix(request("b", list(range(8))))) == 1
    assert len(kv.find_prefix(request("c", list(range(9))))) == 2


def test_running_requests_share_blocks_and_the_last_one_frees_them() -> None:
    kv = manager()
    first, second = request("a", list(range(9))), request("b", list(range(9)))
    kv.allocate(first, 9)
    used = kv.num_used_blocks
    kv.allocate(second, 9, kv.find_prefix(second))
    assert kv.num_used_blocks == used + 1
    kv.free(first)
    assert len(kv.find_prefix(request("c", list(range(9))))) == 2
    kv.free(second)
    assert kv.num_used_blocks == 0
    kv.check_integrity()


def test_allocation_that_does_not_fit_changes_nothing() -> None:
    kv = manager(num_blocks=4)
    first = request("a", list(range(8)))
    kv.allocate(first, 8)
    other = request("b", list(range(50, 59)))
    assert kv.allocate(other, 9) is None
    assert other.kv_capacity == 0 and kv.pool.num_free == 1
    kv.check_integrity()


def test_a_prefix_in_the_free_queue_counts_as_room_only_once() -> None:
    kv = manager(num_blocks=4)  # three usable
    first = request("a", list(range(12)))
    kv.allocate(first, 12)
    kv.free(first)
    second = request("b", [*range(8), 90, 91, 92, 93, 94])  # two cached blocks and two new ones: four in all
    prefix = kv.find_prefix(second)
    assert len(prefix) == 2
    assert kv.allocate(second, 13, prefix) is None
    assert len(kv.find_prefix(second)) == 2  # and nothing was lost by trying
    kv.check_integrity()


def test_the_oldest_unreferenced_prefix_goes_first_its_end_before_its_beginning() -> None:
    kv = manager(num_blocks=6)  # five usable
    old, young = request("old", list(range(8))), request("young", list(range(20, 28)))
    for each in (old, young):
        kv.allocate(each, 8)
        kv.free(each)
    kv.allocate(request("new", [1] * 8), 8)  # takes the block nobody used, then the end of the oldest prefix
    assert len(kv.find_prefix(request("o", [*range(8), 0]))) == 1
    assert len(kv.find_prefix(request("y", [*range(20, 28), 0]))) == 2


def test_unconfirmed_tokens_are_not_published() -> None:
    kv = manager()
    running = request("a", list(range(7)))
    kv.allocate(running, 8)  # room for the token a step in flight will sample; its id is not known
    assert len(kv.find_prefix(request("b", [*range(8), 9]))) == 1  # the second block's last token is not known
    running.append(7)
    kv.allocate(running, 9)
    assert len(kv.find_prefix(request("b", [*range(8), 9]))) == 2


def test_a_request_that_runs_finds_what_another_has_filled_and_takes_it_for_its_own() -> None:
    kv = manager(num_blocks=12)
    ahead, behind = request("a", list(range(14))), request("b", [*range(12), 50, 51])
    kv.allocate(ahead, 6)
    ahead.num_computed_tokens = 6
    kv.allocate(behind, 6, kv.find_prefix(behind))
    behind.num_computed_tokens = 6  # in the second block, which neither has filled
    assert not kv.finds_more(behind)
    ids = kv.block_ids(ahead) + kv.allocate(ahead, 14)
    assert kv.finds_more(behind)
    used = kv.num_used_blocks
    kv.adopt(behind, kv.find_prefix(behind))
    assert kv.block_ids(behind) == ids[:3] and behind.kv_capacity == 12 and kv.num_used_blocks == used - 1
    behind.num_computed_tokens = 12
    assert not kv.finds_more(behind)
    kv.allocate(behind, 14)
    kv.check_integrity()
    kv.free(ahead)
    kv.free(behind)
    kv.check_integrity()
    assert kv.num_used_blocks == 0


def test_no_more_is_found_than_leaves_a_token_to_compute() -> None:
    kv = manager(num_blocks=12)
    kv.allocate(request("a", list(range(12))), 12)
    for num_tokens, found in ((8, False), (9, True)):
        each = request(f"r{num_tokens}", list(range(num_tokens)))
        kv.allocate(each, 6)
        each.num_computed_tokens = 6
        assert kv.finds_more(each) is found
    assert not KVCacheManager(9, 4, None).finds_more(request("c", list(range(12))))


def test_evictions_of_cached_content_are_counted() -> None:
    kv = manager(num_blocks=4)
    first = request("a", list(range(9)))
    kv.allocate(first, 9)
    kv.free(first)
    assert kv.pool.num_evictions == 0
    kv.allocate(request("b", [1] * 9), 9)
    assert kv.pool.num_evictions == 2


def test_without_a_hasher_nothing_is_ever_found() -> None:
    kv = KVCacheManager(9, 4, None)
    first = request("a", list(range(9)))
    kv.allocate(first, 9)
    assert kv.find_prefix(request("b", list(range(9)))) == []


def test_equal_content_computed_twice_is_findable_once() -> None:
    kv = manager()
    first, second = request("a", list(range(4))), request("b", list(range(4)))
    kv.allocate(first, 4)
    kv.allocate(second, 4)  # did not look for a prefix
    kv.check_integrity()
    kv.free(first)
    kv.free(second)
    kv.check_integrity()
    assert len(kv.find_prefix(request("c", list(range(5))))) == 1


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(2, 40), block_size=st.sampled_from([1, 3, 16]))
def test_free_and_used_are_all_and_every_hit_is_a_true_prefix(seed: int, num_blocks: int, block_size: int) -> None:
    rng = random.Random(seed)
    kv = manager(num_blocks, block_size)
    live: list[Request] = []
    content: dict[int, tuple[int, ...]] = {}  # block id -> all tokens up to its end, as last scheduled
    for turn in range(60):
        if live and rng.random() < 0.4:
            kv.free(live.pop(rng.randrange(len(live))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 4 * block_size + 2))]
            new = request(f"r{turn}", tokens)
            prefix = kv.find_prefix(new)
            for index, block in enumerate(prefix):
                assert content[block.block_id] == tuple(tokens[: (index + 1) * block_size])
            free_before = kv.pool.num_free
            ids = kv.allocate(new, len(tokens), prefix)
            if ids is None:
                assert kv.pool.num_free == free_before
                continue
            assert len(ids) == -(-len(tokens) // block_size) and len(set(ids)) == len(ids) and 0 not in ids
            for index, block_id in enumerate(ids):
                content[block_id] = tuple(tokens[: (index + 1) * block_size])
            live.append(new)
        kv.check_integrity()
    for each in live:
        kv.free(each)
    kv.check_integrity()
    assert kv.num_used_blocks == 0 and kv.pool.num_free == num_blocks - 1


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(block.block_id for block in pool.take(4)) == [1, 2, 3, 4]
    with pytest.raises(IndexError):
        pool.take(1)


def test_a_broken_ledger_is_noticed() -> None:
    kv = manager()
    first = request("a", list(range(9)))
    ids = kv.allocate(first, 9)
    kv.pool.blocks[ids[0]].ref_count += 1
    with pytest.raises(RuntimeError):
        kv.check_integrity()


def test_forgetting_leaves_what_is_referenced() -> None:
    kv = manager()
    live, dead = request("a", list(range(8))), request("b", list(range(30, 38)))
    for each in (live, dead):
        kv.allocate(each, 8)
    kv.free(dead)
    kv.pool.forget_unreferenced()
    assert len(kv.find_prefix(request("c", [*range(8), 0]))) == 2
    assert kv.find_prefix(request("d", [*range(30, 38), 0])) == []
    kv.check_integrity()
