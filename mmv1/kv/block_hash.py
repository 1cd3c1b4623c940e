"""The hash of a KV block: a chain over its parent, its token ids and the pictures in it.

Two blocks share a key only if everything that determines their KV is equal: all earlier tokens and pictures (through the
parent), the block's token ids, for every picture touching the block its mm_hash and where the picture starts relative to the
block, and the request's cache salt (in the root). All fields have fixed lengths, so no two different inputs are the same
bytes. Keys are 32 bytes and keyed with a secret of this process: they cannot be guessed or collided from outside.

The scheme is vLLM V1's (block hashes with multimodal extra keys), with the offset and hash as binary fields.
"""

from __future__ import annotations

import array
import secrets
import struct
from collections.abc import Sequence

from mmv1.config import HashAlgorithm
from mmv1.digest import KEY_BYTES, keyed_digest
from mmv1.request import Request
from mmv1.types import MMFeature

_PICTURE = struct.Struct("<32sq")  # mm_hash, offset of the picture's first token relative to the block's first


class BlockHasher:
    """Extends `Request.block_hashes` as far as its confirmed tokens fill blocks."""

    def __init__(self, block_size: int, algorithm: HashAlgorithm = "blake3", key: bytes | None = None) -> None:
        self.block_size = block_size
        self._digest = keyed_digest(algorithm, key or secrets.token_bytes(KEY_BYTES))

    def extend(self, request: Request, num_blocks: int) -> None:
        """Make sure the first `num_blocks` blocks have their hashes. All their tokens must be confirmed."""
        hashes = request.block_hashes
        first = len(hashes)
        if first >= num_blocks:
            return
        size, digest = self.block_size, self._digest
        parent = hashes[-1] if hashes else digest(b"mmv1/kv/1" + request.cache_salt)
        tokens = array.array("i", request.token_ids[first * size : num_blocks * size]).tobytes()
        stride = 4 * size
        pictures = _pictures_by_block(request.mm_features, size, first, num_blocks) if first * size < request.mm_end else {}
        for index in range(first, num_blocks):
            at = (index - first) * stride
            parent = digest(parent + tokens[at : at + stride] + pictures.get(index, b""))
            hashes.append(parent)


def _pictures_by_block(features: Sequence[MMFeature], block_size: int, first: int, stop: int) -> dict[int, bytes]:
    """block index in [first, stop) -> the fields of the pictures whose tokens touch it, in order of offset."""
    fields: dict[int, bytes] = {}
    for feature in features:
        first_block = max(first, feature.offset // block_size)
        last_block = min(stop - 1, (feature.offset + feature.num_tokens - 1) // block_size)
        for index in range(first_block, last_block + 1):
            fields[index] = fields.get(index, b"") + _PICTURE.pack(feature.mm_hash, feature.offset - index * block_size)
    return fields
