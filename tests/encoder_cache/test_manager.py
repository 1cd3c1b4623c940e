"""The encoder cache's ledger: who holds what, who goes first, and that the books always balance."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmv1.encoder_cache.manager import EncoderCacheManager

A, B, C, D = (bytes([i]) * 32 for i in range(4))
PAGE = 16  # rows; one byte a row here


def cache(pages: int, *complete: bytes) -> EncoderCacheManager:
    """With complete entries of one page each."""
    ledger = EncoderCacheManager(pages * PAGE, bytes_per_token=1)
    for mm_hash in complete:
        ledger.allocate(mm_hash, 16, "r", ())
        ledger.complete(mm_hash)
    return ledger


def test_entries_take_whole_pages() -> None:
    ledger = cache(4)
    assert [ledger.size_of(n) for n in (1, 16, 17, 33)] == [16, 16, 32, 48]
    assert EncoderCacheManager(100, 1).capacity_bytes == 96


def test_entries_stay_until_room_is_needed_and_the_least_recently_used_goes_first() -> None:
    ledger = cache(2, A, B)
    assert A in ledger and B in ledger and ledger.take_freed() == []
    ledger.reference(A, "s")
    ledger.release(A)  # used again: now the youngest
    ledger.allocate(C, 16, "t", ())
    assert A in ledger and B not in ledger and ledger.take_freed() == [B]
    ledger.check_integrity({C})


def test_what_is_touched_goes_last() -> None:
    ledger = cache(2, A, B)
    ledger.touch(A)
    ledger.touch(D)  # not there: nothing happens
    ledger.allocate(C, 16, "t", ())
    assert A in ledger and B not in ledger


def test_what_a_step_reads_is_not_evicted() -> None:
    ledger = cache(2, A, B)
    ledger.reference(A, "r")
    ledger.reference(A, "s")
    ledger.release(A)
    assert not ledger.fits(17, ())
    ledger.allocate(C, 16, "t", ())
    assert A in ledger and B not in ledger
    ledger.complete(C)
    ledger.release(A)
    assert ledger.fits(32, ())


def test_what_is_being_encoded_is_there_and_not_usable_and_not_evicted() -> None:
    ledger = cache(2)
    ledger.allocate(A, 16, "r", ())
    assert A in ledger and not ledger.is_complete(A) and not ledger.fits(32, ())
    ledger.forget_unreferenced()
    assert A in ledger and ledger.num_held == 1
    ledger.complete(A)
    assert ledger.is_complete(A) and ledger.fits(32, ()) and ledger.num_held == 0
    ledger.check_integrity()


def test_what_is_to_be_kept_is_not_evicted() -> None:
    ledger = cache(3, A, B, C)
    assert ledger.fits(32, {A}) and not ledger.fits(33, {A}) and not ledger.fits(16, {A, B, C})
    assert ledger.fits(48, {D})  # not there: takes no room
    ledger.allocate(D, 32, "t", {A})  # the oldest of all
    assert A in ledger and ledger.take_freed() == [B, C]
    ledger.check_integrity({D})


def test_room_that_is_not_there_is_not_given() -> None:
    ledger = cache(2, A, B)
    with pytest.raises(RuntimeError):
        ledger.allocate(C, 32, "t", {A})
    assert A in ledger and B in ledger and ledger.take_freed() == []


def test_a_hit_is_what_was_encoded_for_another() -> None:
    ledger = cache(1, A)
    assert ledger.reference(A, "r") is False
    assert ledger.reference(A, "s") is True


def test_forgetting_leaves_what_is_read() -> None:
    ledger = cache(3, A, B, C)
    ledger.reference(A, "r")
    ledger.forget_unreferenced()
    assert A in ledger and B not in ledger and C not in ledger
    assert sorted(ledger.take_freed()) == [B, C]
    ledger.check_integrity()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), pages=st.integers(3, 10), may_be_read=st.booleans())
def test_the_books_balance_and_the_store_never_overflows(seed: int, pages: int, may_be_read: bool) -> None:
    """`may_be_read`: steps may follow the batches."""
    rng = random.Random(seed)
    ledger = cache(pages)
    sizes = {bytes([i]) * 32: rng.randrange(1, 40) for i in range(8)}
    stored: dict[bytes, int] = {}  # as a worker would keep it, told only of allocations and frees
    encoding: list[bytes] = []
    references: list[bytes] = []
    for _ in range(120):
        mm_hash = rng.choice(list(sizes))
        action = rng.randrange(6)
        if action <= 1:
            keep = set(rng.sample(list(sizes), k=rng.randrange(4)))
            if mm_hash not in ledger and ledger.fits(sizes[mm_hash], keep):
                ledger.allocate(mm_hash, sizes[mm_hash], "r", keep)
                encoding.append(mm_hash)
                for freed in ledger.take_freed():
                    assert freed not in keep
                    del stored[freed]
                stored[mm_hash] = -(-sizes[mm_hash] // PAGE)
                assert sum(stored.values()) <= pages
        elif action == 2 and encoding:
            ledger.complete(encoding.pop(rng.randrange(len(encoding))))
        elif action == 3 and (ledger.is_complete(mm_hash) or (may_be_read and mm_hash in encoding)):
            ledger.reference(mm_hash, "r")
            references.append(mm_hash)
        elif action == 4 and references:
            ledger.release(references.pop(rng.randrange(len(references))))
        elif action == 5:
            ledger.touch(mm_hash)
        ledger.check_integrity(encoding, may_be_read=may_be_read)
        assert all(held in ledger for held in [*references, *encoding]), "an entry that is in use was evicted"
        assert ledger.num_held == len({*references, *encoding})
        assert {mm_hash for mm_hash in sizes if mm_hash in ledger} == set(stored)


def test_a_broken_ledger_is_noticed() -> None:
    ledger = cache(2)
    ledger.allocate(A, 16, "r", ())
    with pytest.raises(RuntimeError, match="or neither"):
        ledger.check_integrity()
    ledger.reference(A, "r")
    ledger.check_integrity({A}, may_be_read=True)
    with pytest.raises(RuntimeError, match="is read that is not complete"):
        ledger.check_integrity({A})
    ledger.complete(A)
    with pytest.raises(RuntimeError, match="or neither"):
        ledger.check_integrity({A})
    ledger = cache(2, A)
    ledger.used_bytes -= 1
    with pytest.raises(RuntimeError):
        ledger.check_integrity()
    ledger = cache(2, A)
    ledger.reference(A, "r")
    ledger.release(A)
    with pytest.raises(RuntimeError):
        ledger.release(A)
        ledger.check_integrity()
