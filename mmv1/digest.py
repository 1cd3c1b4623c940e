"""Keyed digests: the one function behind every cache key, of pictures and of KV blocks."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable

import blake3
import xxhash

from mmv1.config import HashAlgorithm

DIGEST_BYTES = 32
KEY_BYTES = 32

Digest = Callable[..., bytes]  # (*pieces: bytes) -> DIGEST_BYTES bytes


def keyed_digest(algorithm: HashAlgorithm, key: bytes) -> Digest:
    """A function from pieces of bytes to the 32-byte digest of what they are when joined; it copies none of them.

    `key`: 32 bytes. blake3 (keyed) and sha256 (as HMAC) resist forgery; xxh3 does not, and serves one trusted tenant only. Its
    16 bytes are widened by a second digest with another seed and the key at the other end.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key of a digest must have {KEY_BYTES} bytes")
    if algorithm == "xxh3":
        first_seed, second_seed = struct.unpack_from("<QQ", key)
        return lambda *pieces: _xxh3(first_seed, (key, *pieces)) + _xxh3(second_seed, (*pieces, key))
    if algorithm == "blake3":
        return lambda *pieces: _updated(blake3.blake3(key=key), pieces)
    start = hmac.new(key, digestmod=hashlib.sha256)
    return lambda *pieces: _updated(start.copy(), pieces)


def _xxh3(seed: int, pieces: tuple[bytes, ...]) -> bytes:
    return _updated(xxhash.xxh3_128(seed=seed), pieces)


def _updated(hasher: blake3.blake3 | hmac.HMAC | xxhash.xxh3_128, pieces: tuple[bytes, ...]) -> bytes:
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()
