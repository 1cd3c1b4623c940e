"""The encoder cache's ledger: which pictures' embeddings are on the device, who needs them, which may go.

Unit of capacity: bytes. An entry costs its rows, rounded up to whole pages (`ENCODER_CACHE_PAGE_ROWS`), times the bytes of a
row, exactly as the store in `tensors.py` lays it out, so the store never has to refuse what this ledger granted.

An entry is held by
- references, one per (request, occurrence of the picture in it): taken when a chunk that touches the picture is scheduled,
  dropped when the step that computes the picture's last token has been executed. A referenced entry is never evicted.
- reservations, one per request: a request still ahead of the picture would like to find it. A reserved entry goes only when
  a scheduled chunk needs the room, never for encoding ahead.
Everything else stays as long as nobody needs the room, least recently used first out.

What it does not do: it holds no embeddings, and it never waits. The workers learn of evictions from `take_freed`.
"""

from __future__ import annotations

from collections import OrderedDict

from mmv1.step import ENCODER_CACHE_PAGE_ROWS


class _Entry:
    __slots__ = ("encoded_for", "references", "reservations", "size_bytes")

    def __init__(self, size_bytes: int, encoded_for: str) -> None:
        self.size_bytes = size_bytes
        self.encoded_for = encoded_for  # the request that caused the encoding
        self.references: set[tuple[str, int]] = set()  # (request_id, index of the picture in the request)
        self.reservations: set[str] = set()


class EncoderCacheManager:
    """All methods are O(1) per picture touched, evictions aside."""

    def __init__(self, capacity_bytes: int, bytes_per_token: int) -> None:
        self._page_bytes = ENCODER_CACHE_PAGE_ROWS * bytes_per_token
        self.capacity_bytes = capacity_bytes // self._page_bytes * self._page_bytes
        self.used_bytes = 0
        self._entries: dict[bytes, _Entry] = {}
        self._evictable: OrderedDict[bytes, _Entry] = OrderedDict()  # neither referenced nor reserved
        self._reserved: OrderedDict[bytes, _Entry] = OrderedDict()  # reserved, not referenced
        self._evictable_bytes = 0
        self._reserved_bytes = 0
        self._held_by: dict[str, dict[bytes, set[int]]] = {}  # request_id -> mm_hash -> occurrences referenced; {} reserved
        self._freed: list[bytes] = []

    def size_of(self, num_tokens: int) -> int:
        """Bytes an entry of `num_tokens` embedding rows takes."""
        return -(-num_tokens // ENCODER_CACHE_PAGE_ROWS) * self._page_bytes

    def __contains__(self, mm_hash: bytes) -> bool:
        return mm_hash in self._entries

    def is_referenced(self, mm_hash: bytes) -> bool:
        entry = self._entries.get(mm_hash)
        return entry is not None and bool(entry.references)

    @property
    def available_bytes(self) -> int:
        """What a scheduled chunk may take: free room and every unreferenced entry."""
        return self.capacity_bytes - self.used_bytes + self._evictable_bytes + self._reserved_bytes

    @property
    def ahead_bytes(self) -> int:
        """What encoding ahead may take: free room and entries nobody asks for."""
        return self.capacity_bytes - self.used_bytes + self._evictable_bytes

    def _unlist(self, mm_hash: bytes, entry: _Entry) -> None:
        if self._evictable.pop(mm_hash, None) is not None:
            self._evictable_bytes -= entry.size_bytes
        elif self._reserved.pop(mm_hash, None) is not None:
            self._reserved_bytes -= entry.size_bytes

    def _list(self, mm_hash: bytes, entry: _Entry) -> None:
        """Put the entry where its holders say it belongs, as the most recently used."""
        self._unlist(mm_hash, entry)
        if entry.references:
            return
        if entry.reservations:
            self._reserved[mm_hash] = entry
            self._reserved_bytes += entry.size_bytes
        else:
            self._evictable[mm_hash] = entry
            self._evictable_bytes += entry.size_bytes

    def allocate(self, mm_hash: bytes, num_tokens: int, request_id: str) -> None:
        """Make room for a picture that is about to be encoded for a request, evicting as needed. The caller has checked that
        it fits, and references or reserves it next: until then it is evictable like any other."""
        size_bytes = self.size_of(num_tokens)
        while self.capacity_bytes - self.used_bytes < size_bytes:
            self._evict(next(iter(self._evictable or self._reserved)))
        entry = self._entries[mm_hash] = _Entry(size_bytes, request_id)
        self.used_bytes += size_bytes
        self._list(mm_hash, entry)

    def _evict(self, mm_hash: bytes) -> None:
        entry = self._entries.pop(mm_hash)
        self._unlist(mm_hash, entry)
        for request_id in entry.reservations:
            self._forget_holding(request_id, mm_hash)
        self.used_bytes -= entry.size_bytes
        self._freed.append(mm_hash)

    def reference(self, mm_hash: bytes, request_id: str, index: int) -> bool | None:
        """Hold the entry for the `index`-th picture of a request; its reservation has served its purpose. Returns None if it
        was held for that already, else whether it was a hit: encoded on behalf of another request."""
        entry = self._entries[mm_hash]
        if (request_id, index) in entry.references:
            return None
        entry.references.add((request_id, index))
        entry.reservations.discard(request_id)
        self._held_by.setdefault(request_id, {}).setdefault(mm_hash, set()).add(index)
        self._unlist(mm_hash, entry)
        return entry.encoded_for != request_id

    def reserve(self, mm_hash: bytes, request_id: str) -> None:
        """Ask to keep the entry for a request that will come to it later."""
        entry = self._entries[mm_hash]
        if request_id in entry.reservations or mm_hash in self._held_by.get(request_id, ()):
            return
        entry.reservations.add(request_id)
        self._held_by.setdefault(request_id, {})[mm_hash] = set()
        self._list(mm_hash, entry)

    def release(self, mm_hash: bytes, request_id: str, index: int) -> None:
        """Drop one reference. Unknown ones are ignored: the request may have let go of everything meanwhile."""
        occurrences = self._held_by.get(request_id, {}).get(mm_hash)
        if not occurrences or index not in occurrences:
            return
        entry = self._entries[mm_hash]
        entry.references.discard((request_id, index))
        occurrences.discard(index)
        if not occurrences:
            self._forget_holding(request_id, mm_hash)
        self._list(mm_hash, entry)

    def release_all(self, request_id: str) -> None:
        """The request ended or was preempted: drop its references and reservations."""
        for mm_hash, occurrences in self._held_by.pop(request_id, {}).items():
            entry = self._entries[mm_hash]
            entry.reservations.discard(request_id)
            entry.references.difference_update((request_id, index) for index in occurrences)
            self._list(mm_hash, entry)

    def _forget_holding(self, request_id: str, mm_hash: bytes) -> None:
        held = self._held_by[request_id]
        del held[mm_hash]
        if not held:
            del self._held_by[request_id]

    def take_freed(self) -> list[bytes]:
        """Evictions since the last call, for the workers to follow before they store anything new."""
        freed, self._freed = self._freed, []
        return freed

    def forget_unreferenced(self) -> None:
        """Evict everything no reference holds."""
        for mm_hash in [*self._evictable, *self._reserved]:
            self._evict(mm_hash)

    @property
    def num_references(self) -> int:
        return sum(len(entry.references) for entry in self._entries.values())

    def check_integrity(self) -> None:
        """Raise if the ledger contradicts itself."""
        if self.used_bytes != sum(entry.size_bytes for entry in self._entries.values()):
            raise RuntimeError("used bytes are not the sum of the entries")
        if not 0 <= self.used_bytes <= self.capacity_bytes:
            raise RuntimeError("more bytes in use than there are")
        for listed, total in ((self._evictable, self._evictable_bytes), (self._reserved, self._reserved_bytes)):
            if total != sum(entry.size_bytes for entry in listed.values()):
                raise RuntimeError("a list's bytes are not the sum of its entries")
        for mm_hash, entry in self._entries.items():
            expected = None if entry.references else self._reserved if entry.reservations else self._evictable
            listed_in = [listed for listed in (self._evictable, self._reserved) if mm_hash in listed]
            if listed_in != ([] if expected is None else [expected]):
                raise RuntimeError("an entry is not listed where its holders say")
            holders = {request_id for request_id, _ in entry.references} | entry.reservations
            if any(mm_hash not in self._held_by.get(request_id, ()) for request_id in holders):
                raise RuntimeError("an entry has a holder that does not know it")
        if any(mm_hash not in self._entries for held in self._held_by.values() for mm_hash in held):
            raise RuntimeError("a request holds an entry that is gone")
