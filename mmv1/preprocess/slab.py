"""The pixel slab: shared memory for processed pictures, found by hash. A store of bytes, and its ledger in one process.

The store is one anonymous file handed on by descriptor; the API server never maps it, so it stays small. The ledger lives in
the API server alone; whoever reads or writes the bytes is told an offset and a length. Knows nothing of pictures or tensors.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from mmv1.errors import ImageError
from mmv1.host import available_memory_bytes

ALIGNMENT = 4096  # bytes; every slot starts and ends on a page
_PREFAULT_STEP = 64 << 20
_NUM_ORDINARY_IMAGES = 300


def default_slab_bytes(largest_image: int, ordinary_image: int) -> int:
    """Room for the largest picture and 300 ordinary ones, within an eighth of the free memory, but for two largest at least."""
    wanted = aligned(largest_image) + _NUM_ORDINARY_IMAGES * aligned(ordinary_image)
    return max(min(wanted, available_memory_bytes() // 8 // ALIGNMENT * ALIGNMENT), 2 * aligned(largest_image))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class SlabStore:
    """One anonymous shared-memory file of `nbytes`, a multiple of ALIGNMENT. `fd` is passed on to other processes.

    On Linux a memfd, sealed against a change of size: no reader can be made to touch a page that is gone. Elsewhere an
    unlinked temporary file.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = aligned(nbytes)
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("mmv1-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        else:
            with tempfile.TemporaryFile(prefix="mmv1-pixels-") as file:
                self.fd = os.dup(file.fileno())
            os.ftruncate(self.fd, self.nbytes)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def prefault(self, on_failure: Callable[[str], None]) -> None:
        """Allocate every page in the background, so that no picture pays for it. `on_failure` is called from that thread."""
        self._thread = threading.Thread(target=self._prefault, args=(on_failure,), name="slab-prefault", daemon=True)
        self._thread.start()

    def _prefault(self, on_failure: Callable[[str], None]) -> None:
        for offset in range(0, self.nbytes, _PREFAULT_STEP):
            if self._closing.is_set():
                return
            try:
                os.posix_fallocate(self.fd, offset, min(_PREFAULT_STEP, self.nbytes - offset))
            except OSError:
                on_failure(f"no memory for the picture slab of {self.nbytes >> 20} MiB: give a smaller --preprocess-slab-gb")
                return

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self.fd)


def map_slab(fd: int, nbytes: int) -> mmap.mmap:
    """The slab in the memory of a process that writes patches into it, or sends them on."""
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@dataclass(slots=True)
class _Slot:
    offset: int
    nbytes: int  # as asked; the slot takes aligned(nbytes)
    pins: int = 1


class SlabLedger:
    """Which picture lies where in a slab of `capacity` bytes. Pure bookkeeping; for one thread.

    slots: a pinned slot stays where it is; unpinned ones are kept for reuse and evicted least recently used first.
    free: the gaps, sorted by offset, never adjacent to one another.
    waiting: allocations that found no room, served strictly in their order: no later one overtakes, so none starves.

    Invariants, `check_integrity`: slots and gaps tile the slab; a slot is in `_lru` if and only if it has no pin.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._slots: dict[bytes, _Slot] = {}
        self._lru: OrderedDict[bytes, None] = OrderedDict()
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (offset, nbytes)
        self._waiting: OrderedDict[bytes, int] = OrderedDict()
        self.num_evictions = 0

    def __contains__(self, mm_hash: bytes) -> bool:
        return mm_hash in self._slots

    @property
    def free_bytes(self) -> int:
        """Bytes in no slot."""
        return sum(size for _, size in self._free)

    @property
    def pinned_bytes(self) -> int:
        return sum(aligned(slot.nbytes) for slot in self._slots.values() if slot.pins)

    @property
    def next_waiting(self) -> bytes | None:
        """Whose turn it is to get room."""
        return next(iter(self._waiting), None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_admissible(self, nbytes: int) -> None:
        """Raises ImageError for a picture that no wait can make room for."""
        if aligned(nbytes) > self.capacity:
            raise ImageError("the image has more pixels, once resized, than this server has memory for", code="image_too_large")

    def allocate(self, mm_hash: bytes, nbytes: int) -> int | None:
        """A slot for a new picture, pinned once: its offset; or None, and the picture waits for its turn (`admit`)."""
        self.check_admissible(nbytes)
        if mm_hash in self._slots or mm_hash in self._waiting:
            raise ValueError("this picture has a slot, or waits for one")
        offset = None if self._waiting else self._take(nbytes)
        if offset is None:
            self._waiting[mm_hash] = nbytes
        else:
            self._slots[mm_hash] = _Slot(offset, nbytes)
        return offset

    def admit(self) -> list[tuple[bytes, int]]:
        """Serve the pictures whose turn has come, (mm_hash, offset) each, pinned once. To be called after every `unpin`,
        `discard` and `withdraw`."""
        admitted = []
        while self._waiting:
            mm_hash, nbytes = next(iter(self._waiting.items()))
            offset = self._take(nbytes)
            if offset is None:
                break
            del self._waiting[mm_hash]
            self._slots[mm_hash] = _Slot(offset, nbytes)
            admitted.append((mm_hash, offset))
        return admitted

    def withdraw(self, mm_hash: bytes) -> None:
        """Stop waiting for a slot."""
        del self._waiting[mm_hash]

    def pin(self, mm_hash: bytes) -> tuple[int, int] | None:
        """Keep a picture where it is: (offset, nbytes), or None when it is not here."""
        slot = self._slots.get(mm_hash)
        if slot is None:
            return None
        slot.pins += 1
        self._lru.pop(mm_hash, None)
        return slot.offset, slot.nbytes

    def unpin(self, mm_hash: bytes) -> None:
        """Take one pin away; the last one makes the picture evictable, as the most recently used."""
        slot = self._slots[mm_hash]
        if slot.pins < 1:
            raise ValueError("unpinned more often than pinned")
        slot.pins -= 1
        if not slot.pins:
            self._lru[mm_hash] = None

    def discard(self, mm_hash: bytes) -> None:
        """Forget a picture, pinned or not: what lies there is not what it should be."""
        self._lru.pop(mm_hash, None)
        self._release(self._slots.pop(mm_hash))

    def _take(self, nbytes: int) -> int | None:
        """First fit; else evict, oldest first, until a gap is large enough. Evicts nothing when that cannot help."""
        size = aligned(nbytes)
        index = next((i for i, (_, gap) in enumerate(self._free) if gap >= size), None)
        if index is None:
            if self._largest_gap_without_lru() < size:
                return None
            while index is None:
                mm_hash, _ = self._lru.popitem(last=False)
                self.num_evictions += 1
                merged = self._release(self._slots.pop(mm_hash))
                index = merged if self._free[merged][1] >= size else None
        offset, gap = self._free[index]
        self._free[index : index + 1] = [(offset + size, gap - size)] if gap > size else []
        return offset

    def _largest_gap_without_lru(self) -> int:
        """The largest stretch between pinned slots."""
        largest = end = 0
        for slot in sorted((s for s in self._slots.values() if s.pins), key=lambda s: s.offset):
            largest = max(largest, slot.offset - end)
            end = slot.offset + aligned(slot.nbytes)
        return max(largest, self.capacity - end)

    def _release(self, slot: _Slot) -> int:
        """Give a slot's bytes back and join them with the gaps beside them: the joined gap's index."""
        start, end = slot.offset, slot.offset + aligned(slot.nbytes)
        index = bisect.bisect_left(self._free, (start, 0))
        last = index
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start = self._free[index][0]
        if last < len(self._free) and self._free[last][0] == end:
            end = sum(self._free[last])
            last += 1
        self._free[index:last] = [(start, end - start)]
        return index

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant of the class does not hold."""
        slots = [(slot.offset, aligned(slot.nbytes), False) for slot in self._slots.values()]
        spans = sorted(slots + [(*gap, True) for gap in self._free])
        position, after_gap = 0, False
        for offset, size, is_gap in spans:
            if offset != position or (is_gap and after_gap) or size <= 0:
                raise RuntimeError(f"the slab is not tiled at {position}")
            position, after_gap = offset + size, is_gap
        if position != self.capacity:
            raise RuntimeError("the slab's bytes do not add up")
        if set(self._lru) != {mm_hash for mm_hash, slot in self._slots.items() if not slot.pins}:
            raise RuntimeError("the evictable pictures are not the unpinned ones")
