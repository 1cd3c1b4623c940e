"""The digest behind every cache key: pieces are joined, the key decides, and the halves of the weak one are independent."""

from __future__ import annotations

import hashlib
import hmac

import blake3
import pytest

from mmv1.config import HashAlgorithm
from mmv1.digest import DIGEST_BYTES, keyed_digest

KEY, OTHER = bytes(range(32)), bytes(32)


@pytest.mark.parametrize("algorithm", ["blake3", "sha256", "xxh3"])
def test_pieces_are_joined_and_the_key_decides(algorithm: HashAlgorithm) -> None:
    digest = keyed_digest(algorithm, KEY)
    assert len(digest(b"ab")) == DIGEST_BYTES
    assert digest(b"ab") == digest(b"a", b"b") == digest(b"", b"ab") == keyed_digest(algorithm, KEY)(b"ab")
    assert len({digest(b"ab"), digest(b"ba"), digest(b""), keyed_digest(algorithm, OTHER)(b"ab")}) == 4
    with pytest.raises(ValueError, match="32 bytes"):
        keyed_digest(algorithm, b"short")


def test_they_are_the_published_functions() -> None:
    assert keyed_digest("blake3", KEY)(b"a", b"b") == blake3.blake3(b"ab", key=KEY).digest()
    assert keyed_digest("sha256", KEY)(b"a", b"b") == hmac.digest(KEY, b"ab", hashlib.sha256)


def test_every_byte_of_the_key_counts() -> None:
    keys = [bytes(32), *(bytes(i) + b"\1" + bytes(31 - i) for i in range(32))]
    for algorithm in ("blake3", "sha256", "xxh3"):
        digests = [keyed_digest(algorithm, key)(b"x") for key in keys]  # type: ignore[arg-type]
        assert len({digest[:16] for digest in digests}) == len({digest[16:] for digest in digests}) == 33
