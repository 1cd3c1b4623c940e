"""The encoder cache's ledger: which pictures' embeddings are on the device, who reads them, which may go.

Unit of capacity: bytes. An entry costs its rows, rounded up to whole pages (`ENCODER_CACHE_PAGE_ROWS`), times the bytes of a
row, exactly as the store in `tensors.py` lays it out, so the store never has to refuse what this ledger granted.

An entry is *encoding* from the moment it is given room until its batch is done, and *complete* afterwards. It may be evicted
when it is complete and no step in flight reads it: `reference` is taken for a scheduled step (also before the batch is done, by
one that is executed behind it), `release` is called when that step has been executed, whatever has become of the request
meanwhile. Nothing else holds an entry. Who will want which, and so what is better kept, changes with every chunk that is
computed; the scheduler knows it, and says it anew whenever it asks for room (`keep`). Of the rest the least recently used goes
first.

What it does not do: it holds no embeddings, and it never waits. The workers learn of evictions from `take_freed`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from mmv1.step import ENCODER_CACHE_PAGE_ROWS


class _Entry:
    __slots__ = ("encoded_for", "is_complete", "num_references", "size_bytes")

    def __init__(self, size_bytes: int, encoded_for: str) -> None:
        self.size_bytes = size_bytes
        self.encoded_for = encoded_for  # the request that caused the encoding
        self.is_complete = False
        self.num_references = 0  # by steps in flight


class EncoderCacheManager:
    """All methods are O(1) per picture touched, evictions and `keep` aside."""

    def __init__(self, capacity_bytes: int, bytes_per_token: int) -> None:
        self._page_bytes = ENCODER_CACHE_PAGE_ROWS * bytes_per_token
        self.capacity_bytes = capacity_bytes // self._page_bytes * self._page_bytes
        self.used_bytes = 0
        self._entries: dict[bytes, _Entry] = {}
        self._evictable: OrderedDict[bytes, _Entry] = OrderedDict()  # complete and not referenced, the next to go first
        self._evictable_bytes = 0
        self._freed: list[bytes] = []

    def size_of(self, num_tokens: int) -> int:
        """Bytes an entry of `num_tokens` embedding rows takes."""
        return -(-num_tokens // ENCODER_CACHE_PAGE_ROWS) * self._page_bytes

    def __contains__(self, mm_hash: bytes) -> bool:
        """Whether it is here, or being encoded."""
        return mm_hash in self._entries

    def is_complete(self, mm_hash: bytes) -> bool:
        entry = self._entries.get(mm_hash)
        return entry is not None and entry.is_complete

    def fits(self, num_tokens: int, keep: Collection[bytes]) -> bool:
        """Whether there is room for such an entry, or can be made without touching what is in `keep`."""
        room = self.capacity_bytes - self.used_bytes + self._evictable_bytes
        size_bytes = self.size_of(num_tokens)
        if room < size_bytes:
            return False
        evictable = self._evictable
        return room - sum(entry.size_bytes for mm_hash in keep if (entry := evictable.get(mm_hash))) >= size_bytes

    def allocate(self, mm_hash: bytes, num_tokens: int, request_id: str, keep: Collection[bytes]) -> None:
        """Make room for a picture that is about to be encoded for a request, evicting what is not in `keep` as needed. The
        caller has checked that it fits."""
        size_bytes = self.size_of(num_tokens)
        lacking = size_bytes - (self.capacity_bytes - self.used_bytes)
        victims = []
        for candidate, entry in self._evictable.items():
            if lacking <= 0:
                break
            if candidate not in keep:
                victims.append(candidate)
                lacking -= entry.size_bytes
        if lacking > 0:
            raise RuntimeError("the encoder cache was asked for room that it does not have")
        for victim in victims:
            self._evict(victim)
        self._entries[mm_hash] = _Entry(size_bytes, request_id)
        self.used_bytes += size_bytes

    def _evict(self, mm_hash: bytes) -> None:
        entry = self._entries.pop(mm_hash)
        self._unlist(mm_hash)
        self.used_bytes -= entry.size_bytes
        self._freed.append(mm_hash)

    def _list(self, mm_hash: bytes, entry: _Entry) -> None:
        self._evictable[mm_hash] = entry
        self._evictable_bytes += entry.size_bytes

    def _unlist(self, mm_hash: bytes) -> None:
        entry = self._evictable.pop(mm_hash, None)
        if entry is not None:
            self._evictable_bytes -= entry.size_bytes

    def complete(self, mm_hash: bytes) -> None:
        """Its batch is done."""
        entry = self._entries[mm_hash]
        entry.is_complete = True
        if entry.num_references == 0:
            self._list(mm_hash, entry)

    def touch(self, mm_hash: bytes) -> None:
        """Of all that may be evicted, let this go last. Unknown hashes are ignored."""
        if mm_hash in self._evictable:
            self._evictable.move_to_end(mm_hash)

    def reference(self, mm_hash: bytes, request_id: str) -> bool:
        """A scheduled step reads the entry for a request. Whether that is a hit: encoded on behalf of another one."""
        entry = self._entries[mm_hash]
        entry.num_references += 1
        self._unlist(mm_hash)
        return entry.encoded_for != request_id

    def release(self, mm_hash: bytes) -> None:
        """That step has been executed."""
        entry = self._entries[mm_hash]
        entry.num_references -= 1
        if entry.num_references == 0 and entry.is_complete:
            self._list(mm_hash, entry)

    def take_freed(self) -> list[bytes]:
        """Evictions since the last call, for the workers to follow before they store anything new."""
        freed, self._freed = self._freed, []
        return freed

    def forget_unreferenced(self, but: Collection[bytes] = ()) -> None:
        """Evict everything that may be, less what is in `but`."""
        for mm_hash in [mm_hash for mm_hash in self._evictable if mm_hash not in but]:
            self._evict(mm_hash)

    @property
    def num_held(self) -> int:
        """Entries that must not go now."""
        return len(self._entries) - len(self._evictable)

    def check_integrity(self, being_encoded: Collection[bytes] = (), *, may_be_read: bool = False) -> None:
        """Raise if the ledger contradicts itself. `being_encoded`: by batches in flight; `may_be_read`: by steps behind them."""
        if self.used_bytes != sum(entry.size_bytes for entry in self._entries.values()):
            raise RuntimeError("used bytes are not the sum of the entries")
        if not 0 <= self.used_bytes <= self.capacity_bytes:
            raise RuntimeError("more bytes in use than there are")
        if self._evictable_bytes != sum(entry.size_bytes for entry in self._evictable.values()):
            raise RuntimeError("evictable bytes are not the sum of the entries that may go")
        for mm_hash, entry in self._entries.items():
            if entry.num_references < 0 or (entry.num_references and not entry.is_complete and not may_be_read):
                raise RuntimeError("an entry is read that is not complete, or released more often than referenced")
            if entry.is_complete == (mm_hash in being_encoded):
                raise RuntimeError("an entry is complete while it is encoded, or neither")
            if (mm_hash in self._evictable) != (entry.is_complete and not entry.num_references):
                raise RuntimeError("an entry is not listed where its state says")
        if not self._evictable.keys() <= self._entries.keys():
            raise RuntimeError("an entry that is gone may be evicted")
