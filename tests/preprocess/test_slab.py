"""The slab: the ledger's promises under random use, and the store's bytes."""

import os
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmv1.errors import ImageError
from mmv1.preprocess.slab import ALIGNMENT, SlabLedger, SlabStore, aligned, default_slab_bytes, map_slab

PAGE = ALIGNMENT


class LedgerMachine(RuleBasedStateMachine):
    """Any order of calls; a model of pins and waiters beside the ledger."""

    @initialize(pages=st.integers(1, 40))
    def start(self, pages):
        self.ledger = SlabLedger(pages * PAGE)
        self.pages = pages
        self.pins: dict[bytes, int] = {}
        self.spans: dict[bytes, tuple[int, int]] = {}
        self.waiting: list[bytes] = []
        self.sizes: dict[bytes, int] = {}
        self.count = 0

    def placed(self, mm_hash, offset):
        size = aligned(self.sizes[mm_hash])
        assert offset % PAGE == 0 and offset >= 0 and offset + size <= self.pages * PAGE
        for other, (start, length) in self.spans.items():
            if self.pins.get(other):
                assert offset + size <= start or start + length <= offset, "overlaps a pinned picture"
        self.spans[mm_hash] = (offset, size)
        self.pins[mm_hash] = 1

    def admit(self):
        for mm_hash, offset in self.ledger.admit():
            assert mm_hash == self.waiting.pop(0), "out of turn"
            self.placed(mm_hash, offset)

    @rule(nbytes=st.integers(1, 30 * PAGE))
    def allocate(self, nbytes):
        mm_hash = self.count.to_bytes(4, "big")
        self.count += 1
        if aligned(nbytes) > self.pages * PAGE:
            with pytest.raises(ImageError) as refusal:
                self.ledger.allocate(mm_hash, nbytes)
            assert refusal.value.code == "image_too_large"
            return
        self.sizes[mm_hash] = nbytes
        offset = self.ledger.allocate(mm_hash, nbytes)
        if offset is None:
            self.waiting.append(mm_hash)
        else:
            assert not self.waiting, "overtook a waiting picture"
            self.placed(mm_hash, offset)

    @precondition(lambda self: self.spans)
    @rule(data=st.data())
    def pin(self, data):
        mm_hash = data.draw(st.sampled_from(sorted(self.spans)))
        slot = self.ledger.pin(mm_hash)
        if slot is None:
            assert not self.pins[mm_hash], "a pinned picture was evicted"
            del self.spans[mm_hash]
        else:
            assert slot == (self.spans[mm_hash][0], self.sizes[mm_hash])
            self.pins[mm_hash] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data):
        mm_hash = data.draw(st.sampled_from(sorted(h for h, pins in self.pins.items() if pins)))
        self.pins[mm_hash] -= 1
        self.ledger.unpin(mm_hash)
        self.admit()

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def discard(self, data):
        mm_hash = data.draw(st.sampled_from(sorted(h for h, pins in self.pins.items() if pins)))
        self.ledger.discard(mm_hash)
        self.pins[mm_hash] = 0
        del self.spans[mm_hash]
        self.admit()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data):
        mm_hash = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(mm_hash)
        self.ledger.withdraw(mm_hash)
        self.admit()

    @invariant()
    def holds(self):
        self.ledger.check_integrity()
        assert self.ledger.pinned_bytes == sum(aligned(self.sizes[h]) for h, pins in self.pins.items() if pins)
        assert self.ledger.num_waiting == len(self.waiting)
        if self.waiting:
            assert any(self.pins.values()), "waits though nothing is pinned"


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_least_recently_used_goes_first():
    ledger = SlabLedger(3 * PAGE)
    for name in (b"a", b"b", b"c"):
        assert ledger.allocate(name, PAGE) is not None
        ledger.unpin(name)
    ledger.pin(b"a")
    ledger.unpin(b"a")
    ledger.allocate(b"d", PAGE)
    assert b"b" not in ledger and b"a" in ledger and b"c" in ledger
    assert ledger.num_evictions == 1


def test_nothing_is_evicted_in_vain():
    ledger = SlabLedger(4 * PAGE)
    for name in (b"a", b"b", b"c", b"d"):
        ledger.allocate(name, PAGE)
    for name in (b"a", b"c", b"d"):
        ledger.unpin(name)
    assert ledger.allocate(b"big", 3 * PAGE) is None  # b stands in the way: evicting a, c and d would not help
    assert all(name in ledger for name in (b"a", b"b", b"c", b"d"))
    ledger.unpin(b"b")
    assert ledger.admit() == [(b"big", 0)]
    assert b"d" not in ledger or b"a" not in ledger


def test_a_small_picture_does_not_overtake():
    ledger = SlabLedger(2 * PAGE)
    ledger.allocate(b"a", PAGE)
    assert ledger.allocate(b"big", 2 * PAGE) is None
    assert ledger.allocate(b"small", PAGE) is None  # though a page is free
    ledger.withdraw(b"big")
    assert ledger.admit() == [(b"small", PAGE)]


def test_misuse_is_an_error():
    ledger = SlabLedger(2 * PAGE)
    ledger.allocate(b"a", 1)
    with pytest.raises(ValueError, match="has a slot"):
        ledger.allocate(b"a", 1)
    ledger.unpin(b"a")
    with pytest.raises(ValueError, match="unpinned"):
        ledger.unpin(b"a")


def test_integrity_check_can_fail():
    ledger = SlabLedger(2 * PAGE)
    ledger.allocate(b"a", 1)
    ledger._free = []
    with pytest.raises(RuntimeError):
        ledger.check_integrity()


def test_store_is_shared_and_allocated_up_front():
    failures = []
    store = SlabStore(3 << 20)
    store.prefault(failures.append)
    store._thread.join()
    assert os.fstat(store.fd).st_blocks * 512 >= 3 << 20
    writer, reader = map_slab(store.fd, store.nbytes), map_slab(store.fd, store.nbytes)
    writer[4096:4100] = b"abcd"
    assert reader[4096:4100] == b"abcd"
    assert not failures
    store.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="sealing needs a memfd")
def test_store_cannot_be_resized():
    store = SlabStore(1 << 20)
    for nbytes in (0, 2 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(store.fd, nbytes)
    store.close()


def test_no_memory_for_the_store_is_reported(monkeypatch):
    def full(*args):
        raise OSError("no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    reported, event = [], threading.Event()
    store = SlabStore(1 << 20)
    store.prefault(lambda reason: (reported.append(reason), event.set()))
    assert event.wait(10) and "--preprocess-slab-gb" in reported[0]
    store.close()


def test_default_size(monkeypatch):
    import mmv1.preprocess.slab as slab

    monkeypatch.setattr(slab, "available_memory_bytes", lambda: 8 << 30)
    assert default_slab_bytes(10 * PAGE, PAGE) == 310 * PAGE
    assert default_slab_bytes(100 << 20, 90 << 20) == 1 << 30
    assert default_slab_bytes(900 << 20, 1 << 20) == 1800 << 20
