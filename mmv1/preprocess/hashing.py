"""mm_hash, the name of a picture everywhere: 32 bytes over what was sent and everything that decides its pixels.

It covers the encoded bytes (not the pixels: cheaper, and two files never become one picture by a decoder's whim), the decode
policy, the image processor's numbers and the tenant's scope. Every field is framed with its length and every digest with a
domain, so no bytes of one field can pass for another field. Keyed: without the secret nobody can compute or collide a key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Sequence

import blake3
import xxhash

from mmv1.config import HashAlgorithm

HASH_BYTES = 32


class KeyedHasher:
    """32-byte keyed digests over framed fields.

    `secret`: at least 16 bytes, shared by the servers that share a cache; None draws a random one for this process.
    blake3 and sha256 (as HMAC) resist forgery; xxh3 does not, and serves one trusted tenant only. Its 16 bytes are widened
    by a second digest with another seed and another framing, so that no 128-bit accident can join two pictures.
    """

    def __init__(self, algorithm: HashAlgorithm = "blake3", secret: bytes | None = None) -> None:
        if secret is not None and len(secret) < 16:
            raise ValueError("the cache secret must have at least 16 bytes")
        self.algorithm = algorithm
        self._key = hashlib.sha256(b"mmv1/cache-key/1" + (secret or secrets.token_bytes(32))).digest()

    def digest(self, domain: bytes, fields: Sequence[bytes]) -> bytes:
        """The digest of `fields`, in order, under `domain`. Copies no field."""
        if self.algorithm == "xxh3":
            seeds = struct.unpack("<QQ", self._key[:16])
            return self._xxh3(domain, fields, seeds[0]) + self._xxh3(domain + b"/second", fields[::-1], seeds[1])
        hasher = blake3.blake3(key=self._key) if self.algorithm == "blake3" else hmac.new(self._key, digestmod=hashlib.sha256)
        for piece in _frames(domain, fields):
            hasher.update(piece)
        return hasher.digest()

    def _xxh3(self, domain: bytes, fields: Sequence[bytes], seed: int) -> bytes:
        hasher = xxhash.xxh3_128(seed=seed)
        for piece in _frames(domain, (self._key, *fields)):
            hasher.update(piece)
        return hasher.digest()


def _frames(domain: bytes, fields: Sequence[bytes]) -> list[bytes]:
    """Each field behind its length; the domain and the number of fields stand first."""
    pieces = [struct.pack("<QQ", len(domain), len(fields)), domain]
    for one in fields:
        pieces += (struct.pack("<Q", len(one)), one)
    return pieces


class ImageHasher:
    """Names pictures for one image processor, whose `fingerprint` says everything that decides its pixels."""

    def __init__(self, hasher: KeyedHasher, *, decode_policy: str, fingerprint: str) -> None:
        self._hasher = hasher
        self._constant = (decode_policy.encode(), fingerprint.encode())

    def mm_hash(self, encoded: bytes, *, container: str, tenant_scope: bytes = b"") -> bytes:
        """32 bytes. `container` tells a picture of our own process (PPM) from one that came in some format."""
        return self._hasher.digest(b"mmv1/image/1", (*self._constant, container.encode(), tenant_scope, encoded))
