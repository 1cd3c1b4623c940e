"""Embeddings of pictures, kept by mm_hash: the least recently used go first. Tenants' scopes are in mm_hash, not here."""

from __future__ import annotations

from collections import OrderedDict

_ENTRY_BYTES = 256  # what Python adds to one entry: the key, two objects' heads, a place in the dictionary


class EmbeddingCache:
    """At most `capacity_bytes` in all. One thread."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, mm_hash: bytes) -> bytes | None:
        values = self._entries.get(mm_hash)
        if values is not None:
            self._entries.move_to_end(mm_hash)
        return values

    def put(self, mm_hash: bytes, values: bytes) -> None:
        """One that is larger than the whole cache is not kept."""
        if mm_hash in self._entries or _size(values) > self.capacity_bytes:
            return
        self._entries[mm_hash] = values
        self.num_bytes += _size(values)
        while self.num_bytes > self.capacity_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= _size(oldest)

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0


def _size(values: bytes) -> int:
    return len(values) + _ENTRY_BYTES
