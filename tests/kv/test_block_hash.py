"""Two blocks share a key only if everything that determines their KV is equal."""

from __future__ import annotations

import pytest

from mmv1.kv.block_hash import BlockHasher
from mmv1.preprocess.hashing import ImageHasher, KeyedHasher
from mmv1.request import Request
from mmv1.types import MMFeature
from tests.simulation import make_request

CAT, DOG = b"c" * 32, b"d" * 32
BLOCK = 4


def hashes(
    tokens: list[int], features: list[MMFeature] | None = None, salt: bytes = b"", algorithm: str = "blake3"
) -> list[bytes]:
    request = Request(make_request("r", tokens, features, cache_salt=salt), (0,))
    BlockHasher(BLOCK, algorithm, key=bytes(32)).extend(request, len(tokens) // BLOCK)  # type: ignore[arg-type]
    return request.block_hashes


def picture(mm_hash: bytes, offset: int, num_tokens: int = 3) -> MMFeature:
    return MMFeature(mm_hash, offset, num_tokens, (1, 2, 2 * num_tokens))


@pytest.mark.parametrize("algorithm", ["blake3", "sha256", "xxh3"])
def test_keys_are_32_bytes_and_depend_on_every_earlier_token(algorithm: str) -> None:
    """T-H3, T-H4."""
    tokens = list(range(16))
    base = hashes(tokens, algorithm=algorithm)
    assert [len(key) for key in base] == [32] * 4 and len(set(base)) == 4
    for position in range(16):
        changed = tokens.copy()
        changed[position] += 100
        other = hashes(changed, algorithm=algorithm)
        first = position // BLOCK
        assert other[:first] == base[:first]
        assert all(a != b for a, b in zip(other[first:], base[first:], strict=True))


def test_70000_pictures_in_one_prompt_have_no_block_in_common() -> None:
    """T-H5: from a picture's bytes to its block. With keys of 16 bits, as were in use elsewhere, tens of thousands would."""
    hasher = ImageHasher(KeyedHasher("blake3", b"s" * 32), decode_policy="p")
    extend = BlockHasher(BLOCK, "blake3", key=bytes(32)).extend
    tokens, keys = [1, 2, 50, 50], []
    for number in range(70_000):
        mm_hash = hasher.mm_hash(number.to_bytes(8, "little") * 8, fingerprint="f", container="encoded")
        request = Request(make_request("r", tokens, [picture(mm_hash, 2, 2)]), (0,))
        extend(request, 1)
        keys += request.block_hashes
    assert len(keys) == len(set(keys)) == 70_000
    assert len({key[:2] for key in keys}) < 50_000
    assert 70_000 - len({key[:4] for key in keys}) < 10  # nothing is wrong with a part of them either


def test_equal_blocks_after_different_parents_differ() -> None:
    assert hashes([1, 2, 3, 4, 9, 9, 9, 9])[1] != hashes([5, 6, 7, 8, 9, 9, 9, 9])[1]
    assert hashes([9] * 8)[0] != hashes([9] * 8)[1]


def test_the_picture_is_in_the_key_of_every_block_it_touches_and_of_those_after() -> None:
    tokens = [50] * 16
    cat, dog = hashes(tokens, [picture(CAT, 6)]), hashes(tokens, [picture(DOG, 6)])
    plain = hashes(tokens)
    assert cat[0] == dog[0] == plain[0]  # the picture begins in the second block
    for index in (1, 2, 3):
        assert len({cat[index], dog[index], plain[index]}) == 3


def test_the_place_of_a_picture_is_in_the_key() -> None:
    tokens = [50] * 12
    assert hashes(tokens, [picture(CAT, 4)])[1] != hashes(tokens, [picture(CAT, 5)])[1]


def test_the_same_picture_one_block_later_is_a_different_chain_but_the_same_relative_place_is_not_confused() -> None:
    tokens = [50] * 12
    early, late = hashes(tokens, [picture(CAT, 0)]), hashes(tokens, [picture(CAT, 4)])
    assert early[0] != late[0] and early[1] != late[1]


def test_order_of_two_pictures_in_one_block_matters() -> None:
    tokens = [50] * 4
    ab = hashes(tokens, [picture(CAT, 0, 2), picture(DOG, 2, 2)])
    ba = hashes(tokens, [picture(DOG, 0, 2), picture(CAT, 2, 2)])
    assert ab != ba


def test_the_salt_is_in_the_root() -> None:
    assert len({hashes([1, 2, 3, 4], salt=salt)[0] for salt in (b"", b"a", b"b", b"ab")}) == 4


def test_hashing_in_pieces_equals_hashing_at_once() -> None:
    tokens, features = list(range(40)), [picture(CAT, 5, 9), picture(DOG, 20, 13)]
    whole = hashes(tokens, features)
    hasher = BlockHasher(BLOCK, key=bytes(32))
    request = Request(make_request("r", tokens, features), (0,))
    for num_blocks in (1, 1, 4, 5, 9, 10):
        hasher.extend(request, num_blocks)
    assert request.block_hashes == whole


def test_keys_of_two_processes_differ() -> None:
    first, second = (Request(make_request("r", [1, 2, 3, 4]), (0,)) for _ in range(2))
    BlockHasher(BLOCK).extend(first, 1)
    BlockHasher(BLOCK).extend(second, 1)
    assert first.block_hashes != second.block_hashes
