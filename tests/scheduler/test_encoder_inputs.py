"""The clip rule, case by case."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mmv1.scheduler.encoder_inputs import Clip, Picture, clip_chunk
from mmv1.types import MMFeature

A, B = b"a" * 32, b"b" * 32


def feature(mm_hash: bytes, offset: int, num_tokens: int) -> MMFeature:
    return MMFeature(mm_hash, offset, num_tokens, (1, 2, 2 * num_tokens))


FEATURES = [feature(A, 10, 5), feature(B, 20, 8)]  # text 0-9, A 10-14, text 15-19, B 20-27, text from 28


def clip(
    computed: int,
    new: int,
    states: dict[bytes, Picture],
    *,
    room: int = 1000,
    budget: int = 1000,
    features: list[MMFeature] = FEATURES,
) -> Clip:
    return clip_chunk(
        features,
        computed,
        new,
        state_of=lambda mm_hash: states.get(mm_hash, Picture.MISSING),
        size_of=lambda n: n,
        available_bytes=room,
        encoder_budget=budget,
    )


def test_text_runs_up_to_and_not_into_a_picture_that_is_missing() -> None:
    assert clip(0, 30, {}).num_new_tokens == 10
    assert clip(4, 30, {}).num_new_tokens == 6
    assert clip(0, 10, {}) == Clip(10)  # ends right before it: not touched
    assert clip(0, 11, {}).blocked_by == 0


def test_a_chunk_that_would_start_inside_a_missing_picture_gets_nothing() -> None:
    for start in range(10, 15):
        assert clip(start, 5, {}).num_new_tokens == 0


def test_a_picture_already_passed_does_not_matter() -> None:
    assert clip(15, 5, {}) == Clip(5)
    assert clip(28, 9, {}) == Clip(9)


def test_chunk_boundaries_may_fall_inside_a_picture_that_is_cached_or_encodable() -> None:
    for state in (Picture.HELD, Picture.CACHED, Picture.READY):
        result = clip(8, 4, {A: state})
        assert result.num_new_tokens == 4 and result.to_reference == [0]
        assert result.to_encode == ([0] if state is Picture.READY else [])
    assert clip(12, 9, {A: Picture.CACHED}).num_new_tokens == 8  # from inside A, up to B


def test_a_picture_past_the_encoder_budget_is_as_good_as_missing() -> None:
    ready = {A: Picture.READY, B: Picture.READY}
    assert clip(0, 40, ready, budget=13).to_encode == [0, 1]
    assert clip(0, 40, ready, budget=12).num_new_tokens == 20
    assert clip(0, 40, ready, budget=4).num_new_tokens == 10
    assert clip(0, 40, {A: Picture.CACHED, B: Picture.HELD}, budget=0).num_new_tokens == 40


def test_a_picture_past_the_room_is_as_good_as_missing() -> None:
    ready = {A: Picture.READY, B: Picture.READY}
    assert clip(0, 40, ready, room=13).to_encode == [0, 1]
    assert clip(0, 40, ready, room=12).num_new_tokens == 20


def test_an_evictable_hit_takes_room_from_what_is_to_be_encoded_behind_it() -> None:
    # Room counts A itself, as it may be evicted; referencing it takes that away.
    assert clip(0, 40, {A: Picture.CACHED, B: Picture.READY}, room=12).num_new_tokens == 20
    assert clip(0, 40, {A: Picture.CACHED, B: Picture.READY}, room=13).num_new_tokens == 40
    assert clip(0, 40, {A: Picture.HELD, B: Picture.READY}, room=8).num_new_tokens == 40


def test_a_picture_that_occurs_twice_is_encoded_once_and_referenced_twice() -> None:
    twice = [feature(A, 2, 5), feature(B, 8, 3), feature(A, 12, 5)]
    result = clip(0, 20, {A: Picture.READY, B: Picture.READY}, features=twice, room=8, budget=8)
    assert (result.num_new_tokens, result.to_encode, result.to_reference) == (20, [0, 1], [0, 1, 2])


@settings(max_examples=300)
@given(data=st.data())
def test_a_clipped_chunk_touches_only_pictures_that_can_be_had(data: st.DataObject) -> None:
    features, at = [], 0
    for _ in range(data.draw(st.integers(0, 5))):
        at += data.draw(st.integers(0, 4))
        features.append(feature(bytes([data.draw(st.integers(0, 3))]) * 32, at, data.draw(st.integers(1, 6))))
        at += features[-1].num_tokens
    # One hash has one size.
    features = [f for f in features if f.num_tokens == next(g.num_tokens for g in features if g.mm_hash == f.mm_hash)]
    states = {bytes([i]) * 32: data.draw(st.sampled_from(list(Picture))) for i in range(4)}
    computed, new = data.draw(st.integers(0, at)), data.draw(st.integers(1, at + 5))
    room, budget = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    result = clip(computed, new, states, room=room, budget=budget, features=features)

    touched = [
        i for i, f in enumerate(features)
        if f.offset < computed + result.num_new_tokens and f.offset + f.num_tokens > computed and result.num_new_tokens > 0
    ]  # fmt: skip
    assert 0 <= result.num_new_tokens <= new
    assert all(states[features[i].mm_hash] is not Picture.MISSING for i in touched)
    assert set(touched) <= set(result.to_reference)
    encoded = {features[i].mm_hash for i in result.to_encode}
    assert encoded == {features[i].mm_hash for i in result.to_reference if states[features[i].mm_hash] is Picture.READY}
    sizes = {f.mm_hash: f.num_tokens for f in features}
    assert sum(sizes[h] for h in encoded) <= min(room, budget)
    if result.num_new_tokens < new:  # clipped: and right at the picture that could not be had
        assert result.blocked_by is not None
        assert result.num_new_tokens == max(0, features[result.blocked_by].offset - computed)
