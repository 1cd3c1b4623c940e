"""The encoder cache's ledger: who holds what, who goes first, and that the books always balance."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmv1.encoder_cache.manager import EncoderCacheManager

A, B, C, D = (bytes([i]) * 32 for i in range(4))
PAGE = 16  # rows; one byte a row here


def cache(pages: int) -> EncoderCacheManager:
    return EncoderCacheManager(pages * PAGE, bytes_per_token=1)


def test_entries_take_whole_pages() -> None:
    ledger = cache(4)
    assert [ledger.size_of(n) for n in (1, 16, 17, 33)] == [16, 16, 32, 48]
    assert EncoderCacheManager(100, 1).capacity_bytes == 96


def test_unreferenced_entries_stay_until_room_is_needed_and_the_oldest_goes_first() -> None:
    ledger = cache(2)
    for mm_hash in (A, B):
        ledger.allocate(mm_hash, 16, "r")
        ledger.reference(mm_hash, "r", 0)
    ledger.release(A, "r", 0)
    ledger.release(B, "r", 0)
    assert A in ledger and B in ledger and ledger.take_freed() == []
    ledger.reference(A, "s", 0)
    ledger.release(A, "s", 0)  # used again: now the youngest
    ledger.allocate(C, 16, "t")
    assert A in ledger and B not in ledger and ledger.take_freed() == [B]
    ledger.check_integrity()


def test_a_referenced_entry_is_never_evicted() -> None:
    ledger = cache(2)
    ledger.allocate(A, 16, "r")
    ledger.reference(A, "r", 0)
    ledger.allocate(B, 16, "r")
    assert ledger.available_bytes == 16
    ledger.allocate(C, 16, "r")
    assert A in ledger and B not in ledger


def test_a_picture_twice_in_one_request_is_held_until_its_last_occurrence_is_done() -> None:
    ledger = cache(1)
    ledger.allocate(A, 16, "r")
    ledger.reference(A, "r", 0)
    ledger.reference(A, "r", 1)
    ledger.release(A, "r", 0)
    assert ledger.is_referenced(A) and ledger.available_bytes == 0
    ledger.release(A, "r", 1)
    assert not ledger.is_referenced(A) and ledger.available_bytes == 16


def test_two_requests_share_one_embedding() -> None:
    ledger = cache(1)
    ledger.allocate(A, 16, "r")
    assert ledger.reference(A, "r", 0) is False  # encoded for itself: no hit
    assert ledger.reference(A, "s", 0) is True
    assert ledger.reference(A, "s", 0) is None  # held already
    ledger.release_all("r")
    assert ledger.is_referenced(A)
    ledger.release_all("s")
    assert not ledger.is_referenced(A) and A in ledger


def test_releasing_what_is_not_held_is_ignored() -> None:
    ledger = cache(1)
    ledger.allocate(A, 16, "r")
    ledger.reference(A, "r", 0)
    ledger.release(A, "other", 0)
    ledger.release(A, "r", 7)
    ledger.release(B, "r", 0)
    assert ledger.is_referenced(A)
    ledger.release_all("r")
    ledger.release_all("r")
    ledger.release(A, "r", 0)
    ledger.check_integrity()


def test_reservations_give_way_to_need_but_not_to_encoding_ahead() -> None:
    ledger = cache(2)
    ledger.allocate(A, 16, "later")
    ledger.reserve(A, "later")
    ledger.allocate(B, 16, "x")
    assert (ledger.available_bytes, ledger.ahead_bytes) == (32, 16)
    ledger.allocate(C, 16, "y")  # takes what nobody asked for first
    assert A in ledger and B not in ledger
    ledger.reference(C, "y", 0)
    ledger.allocate(D, 16, "y")
    assert A not in ledger  # a reservation is a wish
    ledger.release_all("later")
    ledger.check_integrity()


def test_a_reference_takes_over_a_reservation() -> None:
    ledger = cache(1)
    ledger.allocate(A, 16, "r")
    ledger.reserve(A, "r")
    ledger.reference(A, "r", 0)
    ledger.reserve(A, "r")
    ledger.release(A, "r", 0)
    assert ledger.ahead_bytes == 16  # nothing of the request is left on it


def test_forgetting_leaves_what_is_referenced() -> None:
    ledger = cache(3)
    for mm_hash in (A, B, C):
        ledger.allocate(mm_hash, 16, "r")
    ledger.reference(A, "r", 0)
    ledger.reserve(B, "s")
    ledger.forget_unreferenced()
    assert A in ledger and B not in ledger and C not in ledger
    assert sorted(ledger.take_freed()) == [B, C]
    ledger.check_integrity()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), pages=st.integers(3, 10))
def test_the_books_balance_and_the_store_never_overflows(seed: int, pages: int) -> None:
    rng = random.Random(seed)
    ledger = cache(pages)
    sizes = {bytes([i]) * 32: rng.randrange(1, 40) for i in range(8)}
    stored: dict[bytes, int] = {}  # as a worker would keep it, told only of allocations and frees
    references: set[tuple[bytes, str, int]] = set()
    requests = ["p", "q", "r"]
    for _ in range(120):
        mm_hash, request_id, index = rng.choice(list(sizes)), rng.choice(requests), rng.randrange(2)
        action = rng.randrange(5)
        if action <= 1:
            if mm_hash in ledger:
                ledger.reference(mm_hash, request_id, index)
                references.add((mm_hash, request_id, index))
            elif ledger.size_of(sizes[mm_hash]) <= ledger.available_bytes:
                ledger.allocate(mm_hash, sizes[mm_hash], request_id)
                for freed in ledger.take_freed():
                    del stored[freed]
                stored[mm_hash] = -(-sizes[mm_hash] // PAGE)
                assert sum(stored.values()) <= pages
        elif action == 2 and mm_hash in ledger:
            ledger.reserve(mm_hash, request_id)
        elif action == 3:
            ledger.release(mm_hash, request_id, index)
            references.discard((mm_hash, request_id, index))
        elif action == 4 and rng.random() < 0.3:
            ledger.release_all(request_id)
            references = {reference for reference in references if reference[1] != request_id}
        ledger.check_integrity()
        assert all(held in ledger for held, _, _ in references), "a referenced entry was evicted"
        assert ledger.num_references == len(references)
        assert {mm_hash for mm_hash in sizes if mm_hash in ledger} == set(stored)
    for request_id in requests:
        ledger.release_all(request_id)
    ledger.check_integrity()
    assert ledger.num_references == 0 and ledger.ahead_bytes == ledger.capacity_bytes


def test_a_broken_ledger_is_noticed() -> None:
    ledger = cache(2)
    ledger.allocate(A, 16, "r")
    ledger.used_bytes -= 1
    with pytest.raises(RuntimeError):
        ledger.check_integrity()
