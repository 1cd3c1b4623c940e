"""How a processed picture lies in the shared store: a small `meta` value, and its patches in chunks.

`meta` is a fixed head (magic, schema, dtype, shape, grid, tokens, sizes) and a digest over the picture's hash, the head and the
patches. What is read is untrusted input: whoever reads knows from the picture's header what the head must be, byte for byte,
so nothing of a stored value is ever interpreted; it is equal to what is expected, or it is not used. The digest binds the key:
one picture's values under another's key are damage too.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

import msgspec

from mmv1.digest import DIGEST_BYTES, keyed_digest

CHUNK_BYTES = 4 << 20  # larger values cost both sides a reallocation for every read of the socket
_MAGIC, _SCHEMA, _UINT8 = b"MMV1", 1, 1
# magic, schema, dtype, number of dimensions, shape, grid_thw, num_tokens, nbytes, bytes of a chunk
_HEAD = struct.Struct("<4sHBB2Q3IIQI")


class PictureShape(msgspec.Struct, frozen=True, array_like=True):
    """All that a picture's header says of its patches: `nbytes` of uint8, one row for each patch of `grid_thw`."""

    grid_thw: tuple[int, int, int]
    num_tokens: int
    nbytes: int

    def head(self) -> bytes:
        rows = self.grid_thw[0] * self.grid_thw[1] * self.grid_thw[2]
        shape = (rows, self.nbytes // rows)
        return _HEAD.pack(_MAGIC, _SCHEMA, _UINT8, len(shape), *shape, *self.grid_thw, self.num_tokens, self.nbytes, CHUNK_BYTES)


def meta_key(mm_hash: bytes) -> bytes:
    return _key(mm_hash, b"meta")


def lease_key(mm_hash: bytes) -> bytes:
    return _key(mm_hash, b"lease")


def chunk_keys(mm_hash: bytes, nbytes: int) -> list[bytes]:
    return [_key(mm_hash, b"%d" % index) for index in range(len(_chunk_sizes(nbytes)))]


def _key(mm_hash: bytes, name: bytes) -> bytes:
    """The braces keep a picture's keys on one node of a cluster."""
    return b"mmv1:{%s}:%s" % (mm_hash.hex().encode(), name)


def _chunk_sizes(nbytes: int) -> list[int]:
    return [min(CHUNK_BYTES, nbytes - start) for start in range(0, nbytes, CHUNK_BYTES)]


def split(patches: memoryview) -> list[bytes]:
    """Copies: the slot they come from may be given to another picture before they are sent."""
    return [bytes(patches[start : start + CHUNK_BYTES]) for start in range(0, len(patches), CHUNK_BYTES)]


class Seal:
    """Makes and checks `meta`. With a secret its digest is a MAC (keyed blake3): nobody without the secret can make a value
    that is believed. Without one it is a checksum (xxh3), against damage only."""

    def __init__(self, secret: bytes | None) -> None:
        key = hashlib.sha256(b"mmv1/store-seal/1" + (secret or b"")).digest()
        self._digest = keyed_digest("xxh3" if secret is None else "blake3", key)

    def meta(self, mm_hash: bytes, shape: PictureShape, chunks: Sequence[bytes]) -> bytes:
        head = shape.head()
        return head + self._digest(mm_hash, head, *chunks)

    def holds(self, mm_hash: bytes, shape: PictureShape, meta: bytes, chunks: Sequence[bytes | None]) -> bool:
        """Whether these values are this picture's, whole and unchanged."""
        head = shape.head()
        if len(meta) != len(head) + DIGEST_BYTES or meta[: len(head)] != head:
            return False
        whole = [chunk for chunk in chunks if chunk is not None]
        if [len(chunk) for chunk in whole] != _chunk_sizes(shape.nbytes):
            return False
        return hmac.compare_digest(meta[len(head) :], self._digest(mm_hash, head, *whole))
