"""Stored values are believed only whole, unchanged, and under their own key."""

import hashlib
import struct

import pytest

from mmv1.preprocess.store_format import CHUNK_BYTES, PictureShape, Seal, chunk_keys, lease_key, meta_key, split

SHAPE = PictureShape((1, 4, 6), 6, 24 * 588)
HASH = hashlib.sha256(b"a").digest()
OTHER = hashlib.sha256(b"b").digest()
PATCHES = bytes(i * 7 % 251 for i in range(SHAPE.nbytes))


def stored(seal, mm_hash=HASH, shape=SHAPE, patches=PATCHES):
    chunks = split(memoryview(patches))
    return seal.meta(mm_hash, shape, chunks), chunks


@pytest.mark.parametrize("secret", [None, b"s" * 16])
def test_what_was_stored_is_believed_and_any_changed_byte_is_not(secret):
    seal = Seal(secret)
    meta, chunks = stored(seal)
    assert seal.holds(HASH, SHAPE, meta, chunks)
    for position in range(len(meta)):
        flipped = bytearray(meta)
        flipped[position] ^= 1
        assert not seal.holds(HASH, SHAPE, bytes(flipped), chunks)
    for position in range(0, SHAPE.nbytes, 997):
        flipped = bytearray(chunks[0])
        flipped[position] ^= 0x80
        assert not seal.holds(HASH, SHAPE, meta, [bytes(flipped)])


@pytest.mark.parametrize("secret", [None, b"s" * 16])
def test_values_under_another_pictures_key_are_not_believed(secret):
    seal = Seal(secret)
    meta, chunks = stored(seal)
    other_meta, other_chunks = stored(seal, OTHER, patches=PATCHES[::-1])
    assert not seal.holds(OTHER, SHAPE, meta, chunks)
    assert not seal.holds(HASH, SHAPE, meta, other_chunks)
    assert not seal.holds(HASH, SHAPE, other_meta, chunks)
    assert not seal.holds(HASH, SHAPE, other_meta, other_chunks)


def test_truncated_missing_and_surplus_values_are_not_believed():
    seal = Seal(None)
    meta, chunks = stored(seal)
    for bad in (chunks[0][:-1], b"", chunks[0] + b"\0"):
        assert not seal.holds(HASH, SHAPE, meta, [bad])
    for bad in ([None], [], [*chunks, b""], [*chunks, *chunks]):
        assert not seal.holds(HASH, SHAPE, meta, bad)
    for bad in (b"", meta[:-1], meta + b"\0", meta[:10]):
        assert not seal.holds(HASH, SHAPE, bad, chunks)


@pytest.mark.parametrize(
    "shape",
    [
        PictureShape((1, 6, 4), 6, SHAPE.nbytes),  # the same bytes, turned
        PictureShape((1, 4, 6), 5, SHAPE.nbytes),
        PictureShape((1, 2, 6), 3, SHAPE.nbytes // 2),
    ],
)
def test_another_grid_is_another_picture(shape):
    seal = Seal(None)
    meta, chunks = stored(seal)
    assert not seal.holds(HASH, shape, meta, chunks)


def test_another_schema_is_not_read():
    seal = Seal(None)
    meta, chunks = stored(seal)
    assert struct.unpack_from("<4sH", meta) == (b"MMV1", 1)
    assert not seal.holds(HASH, SHAPE, meta[:4] + struct.pack("<H", 2) + meta[6:], chunks)


def test_a_value_made_without_the_secret_or_with_another_is_not_believed():
    meta, chunks = stored(Seal(None))
    with_secret, _ = stored(Seal(b"s" * 16))
    assert not Seal(b"s" * 16).holds(HASH, SHAPE, meta, chunks)
    assert not Seal(b"t" * 16).holds(HASH, SHAPE, with_secret, chunks)
    assert not Seal(None).holds(HASH, SHAPE, with_secret, chunks)


def test_chunks_have_at_most_4_mib_and_the_picture_in_order():
    shape = PictureShape((1, 140, 140), 4900, 19600 * 588)
    patches = hashlib.shake_128(b"picture").digest(shape.nbytes)
    meta, chunks = stored(Seal(None), shape=shape, patches=patches)
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, shape.nbytes - 2 * CHUNK_BYTES]
    assert CHUNK_BYTES <= 4 << 20 and len(meta) < 128
    assert b"".join(chunks) == patches and Seal(None).holds(HASH, shape, meta, chunks)
    assert not Seal(None).holds(HASH, shape, meta, [chunks[1], chunks[0], chunks[2]])
    assert len(chunk_keys(HASH, shape.nbytes)) == 3


def test_keys_name_the_whole_hash_and_are_distinct():
    keys = [meta_key(HASH), lease_key(HASH), *chunk_keys(HASH, 3 * CHUNK_BYTES), meta_key(OTHER)]
    assert len(set(keys)) == len(keys) and all(key.startswith(b"mmv1:{") for key in keys)
    assert all(HASH.hex().encode() in key for key in keys[:-1])
