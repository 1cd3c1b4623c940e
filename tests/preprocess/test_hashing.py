"""mm_hash: framing, options, length, secrets."""

import itertools

import pytest

from mmv1.preprocess.hashing import ImageHasher, KeyedHasher

ALGORITHMS = ("blake3", "sha256", "xxh3")
SECRET = b"s" * 32


@pytest.fixture(params=ALGORITHMS)
def hasher(request):
    return KeyedHasher(request.param, SECRET)


def mm_hash(hasher, data, policy="rgb/1", fingerprint="qwen/1", container="encoded", **scope):
    return ImageHasher(hasher, decode_policy=policy).mm_hash(data, fingerprint=fingerprint, container=container, **scope)


def test_keys_are_32_bytes_and_repeatable(hasher):
    """T-H4; that they stay so to the end is test_block_hash's and, for features, test_preprocessor's."""
    key = hasher.digest(b"d", [b"abc"])
    assert len(key) == 32
    assert key == KeyedHasher(hasher.algorithm, SECRET).digest(b"d", [b"abc"])


def test_joined_fields_differ_from_separate_ones(hasher):
    """T-H4."""
    lists = ([b"ab"], [b"a", b"b"], [b"", b"ab"], [b"ab", b""], [b"a", b"", b"b"], [], [b""], [b"b", b"a"])
    assert len({hasher.digest(b"d", fields) for fields in lists}) == len(lists)


def test_domains_are_apart(hasher):
    assert hasher.digest(b"d", [b"ab"]) != hasher.digest(b"da", [b"b"]) != hasher.digest(b"e", [b"ab"])


def test_a_suffix_never_passes_for_an_option(hasher):
    """T-H6: an attacker who appends an option's bytes, framed or not, to a file behind its end does not get the option's key."""
    image = b"\xff\xd8 picture \xff\xd9"
    options = (b"tenant", b"encoded", b"rgb/1", b"qwen/1")
    with_option = {mm_hash(hasher, image, tenant_scope=o) for o in options}
    with_option |= {mm_hash(hasher, image, policy="rgb/1" + o.decode()) for o in options}
    with_option |= {mm_hash(hasher, image, fingerprint="qwen/1" + o.decode()) for o in options}
    suffixed = {
        mm_hash(hasher, image + frame + o)
        for o in options
        for frame in (b"", len(o).to_bytes(8, "little"), bytes([len(o)]), b"\0")
    }
    assert not with_option & suffixed


def test_every_option_changes_the_key(hasher):
    keys = {
        mm_hash(hasher, data, policy, fingerprint, container, tenant_scope=scope)
        for policy, fingerprint, data, container, scope in itertools.product(
            ("rgb/1", "rgb/2"), ("qwen/1", "qwen/2"), (b"x", b"y"), ("encoded", "ppm"), (b"", b"t1", b"t2")
        )
    }
    assert len(keys) == 2 * 2 * 2 * 2 * 3


def test_the_secret_decides_and_is_random_unless_given(hasher):
    algorithm = hasher.algorithm
    keys = {KeyedHasher(algorithm, secret).digest(b"d", [b"x"]) for secret in (SECRET, b"t" * 32, None, None)}
    assert len(keys) == 4


def test_both_halves_of_xxh3_are_independent():
    hasher = KeyedHasher("xxh3", SECRET)
    keys = [hasher.digest(b"d", [n.to_bytes(2, "big")]) for n in range(500)]
    halves = [half for key in keys for half in (key[:16], key[16:])]
    assert len(set(halves)) == 1000


def test_algorithms_differ():
    assert len({KeyedHasher(algorithm, SECRET).digest(b"d", [b"x"]) for algorithm in ALGORITHMS}) == 3


def test_a_short_secret_is_refused():
    with pytest.raises(ValueError, match="16 bytes"):
        KeyedHasher("blake3", b"short")
