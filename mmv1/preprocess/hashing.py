"""mm_hash, the name of a picture everywhere: 32 bytes over what was sent and everything that decides its pixels.

It covers the encoded bytes (not the pixels: cheaper, and two files never become one picture by a decoder's whim), the decode
policy, the image processor's numbers, the pixel limits in force and the tenant's scope. Every field is framed with its length
and every digest with a domain, so no bytes of one field can pass for another field. Keyed: without the secret nobody can
compute or collide a key.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Sequence

from mmv1.config import HashAlgorithm
from mmv1.digest import keyed_digest


class KeyedHasher:
    """32-byte keyed digests over framed fields.

    `secret`: at least 16 bytes, shared by the servers that share a cache; None draws a random one for this process.
    """

    def __init__(self, algorithm: HashAlgorithm = "blake3", secret: bytes | None = None) -> None:
        if secret is not None and len(secret) < 16:
            raise ValueError("the cache secret must have at least 16 bytes")
        self.algorithm = algorithm
        key = hashlib.sha256(b"mmv1/cache-key/1" + (secret or secrets.token_bytes(32))).digest()
        self._digest = keyed_digest(algorithm, key)

    def digest(self, domain: bytes, fields: Sequence[bytes]) -> bytes:
        """The digest of `fields`, in order, under `domain`. Copies no field."""
        return self._digest(*_frames(domain, fields))


def _frames(domain: bytes, fields: Sequence[bytes]) -> list[bytes]:
    """Each field behind its length; the domain and the number of fields stand first."""
    pieces = [struct.pack("<QQ", len(domain), len(fields)), domain]
    for one in fields:
        pieces += (struct.pack("<Q", len(one)), one)
    return pieces


class ImageHasher:
    """Names pictures for one decoder."""

    def __init__(self, hasher: KeyedHasher, *, decode_policy: str) -> None:
        self._hasher = hasher
        self._decode_policy = decode_policy.encode()

    def mm_hash(self, encoded: bytes, *, fingerprint: str, container: str, tenant_scope: bytes = b"") -> bytes:
        """32 bytes. `fingerprint`: the image processor's numbers and the pixel limits in force for this picture. `container`
        tells a picture of our own process (PPM) from one that came in some format."""
        fields = (self._decode_policy, fingerprint.encode(), container.encode(), tenant_scope, encoded)
        return self._hasher.digest(b"mmv1/image/1", fields)
