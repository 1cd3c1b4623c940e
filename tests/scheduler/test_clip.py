"""The clip rule, case by case."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mmv1.scheduler.clip import Clip, clip_chunk
from mmv1.types import MMFeature

A, B = b"a" * 32, b"b" * 32


def feature(mm_hash: bytes, offset: int, num_tokens: int) -> MMFeature:
    return MMFeature(mm_hash, offset, num_tokens, (1, 2, 2 * num_tokens))


FEATURES = [feature(A, 10, 5), feature(B, 20, 8)]  # text 0-9, A 10-14, text 15-19, B 20-27, text from 28


def clip(computed: int, new: int, complete: set[bytes], features: list[MMFeature] = FEATURES) -> Clip:
    return clip_chunk(features, computed, new, complete.__contains__)


def test_text_runs_up_to_and_not_into_a_picture_that_is_missing() -> None:
    assert clip(0, 30, set()) == Clip(10, range(0), 0)
    assert clip(4, 30, set()).num_new_tokens == 6
    assert clip(0, 10, set()) == Clip(10, range(0))  # ends right before it: not touched
    assert clip(0, 11, set()).blocked_by == 0


def test_a_chunk_that_would_start_inside_a_missing_picture_gets_nothing() -> None:
    for start in range(10, 15):
        assert clip(start, 5, {B}).num_new_tokens == 0


def test_a_picture_already_passed_does_not_matter() -> None:
    assert clip(15, 5, set()) == Clip(5, range(1, 1))
    assert clip(28, 9, set()) == Clip(9, range(2, 2))


def test_chunk_boundaries_may_fall_inside_a_picture_that_is_there() -> None:
    assert clip(8, 4, {A}) == Clip(4, range(1))
    assert clip(12, 9, {A}) == Clip(8, range(1), 1)  # from inside A, up to B
    assert clip(12, 9, {A, B}) == Clip(9, range(2))


def test_a_picture_that_occurs_twice_is_touched_twice() -> None:
    twice = [feature(A, 2, 5), feature(B, 8, 3), feature(A, 12, 5)]
    assert clip(0, 20, {A, B}, twice) == Clip(20, range(3))
    assert clip(0, 20, {A}, twice) == Clip(8, range(1), 1)


@settings(max_examples=300)
@given(data=st.data())
def test_a_clipped_chunk_touches_only_pictures_that_are_there(data: st.DataObject) -> None:
    features, at = [], 0
    for _ in range(data.draw(st.integers(0, 5))):
        at += data.draw(st.integers(0, 4))
        features.append(feature(bytes([data.draw(st.integers(0, 3))]) * 32, at, data.draw(st.integers(1, 6))))
        at += features[-1].num_tokens
    complete = {bytes([i]) * 32 for i in range(4) if data.draw(st.booleans())}
    computed, new = data.draw(st.integers(0, at)), data.draw(st.integers(1, at + 5))
    result = clip(computed, new, complete, features)

    end = computed + result.num_new_tokens
    touched = [i for i, f in enumerate(features) if f.offset < end and f.offset + f.num_tokens > computed < end]
    assert 0 <= result.num_new_tokens <= new
    assert list(result.touched) == touched
    assert all(features[i].mm_hash in complete for i in touched)
    if result.num_new_tokens < new:  # clipped: and right at the picture that is not there
        assert result.blocked_by is not None and features[result.blocked_by].mm_hash not in complete
        assert result.num_new_tokens == max(0, features[result.blocked_by].offset - computed)
