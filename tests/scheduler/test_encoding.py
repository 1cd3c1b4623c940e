"""Encode batches: what is asked for, what is encoded when, and who gets room in a cache that is short."""

from __future__ import annotations

import pytest

from mmv1.request import Request
from mmv1.scheduler import encoding
from mmv1.types import EngineCoreRequest, FinishReason, MMFeature
from tests.scheduler.harness import Harness
from tests.simulation import expected_output, make_request

CAT, DOG, ELK, FOX = (name * 32 for name in (b"c", b"d", b"e", b"f"))
SIZE = 16  # tokens of a picture: a page of the cache


def with_pictures(name: str, *hashes: bytes, text: int = 1, size: int = SIZE, max_tokens: int = 3) -> EngineCoreRequest:
    """A text of its own before each picture."""
    prompt: list[int] = []
    features = []
    for mm_hash in hashes:
        prompt += [text] * 3
        features.append(MMFeature(mm_hash, len(prompt), size, (1, 2, 2 * size)))
        prompt += [50] * size
    return make_request(name, [*prompt, text], features, max_tokens=max_tokens, eos=())


def encoded(batch) -> list[bytes]:  # type: ignore[no-untyped-def]
    return [item.mm_hash for item in batch.inputs]


def complete(harness: Harness, *hashes: bytes) -> None:
    """Bring these pictures' pixels, and encode all that is encoded then."""
    harness.launch_encode()
    for mm_hash in hashes:
        assert harness.answer_pixels(mm_hash)
    while harness.encode():
        pass


def cached(harness: Harness) -> set[bytes]:
    return {mm_hash for mm_hash in (CAT, DOG, ELK, FOX) if mm_hash in harness.scheduler.encoder_cache}


def finish(harness: Harness, *requests: EngineCoreRequest) -> None:
    harness.drain()
    for request in requests:
        assert harness.outputs[request.request_id] == expected_output(request)


def test_batches_follow_the_order_of_need_and_only_what_is_here() -> None:
    harness = Harness(max_num_encoder_tokens=3 * SIZE, num_blocks=200)
    requests = [with_pictures("r", CAT, DOG), with_pictures("s", ELK, text=2), with_pictures("t", FOX, CAT, text=3)]
    for request in requests:
        harness.add(request)
    assert harness.launch_encode() is None
    assert list(harness.asked) == [CAT, DOG, ELK, FOX]
    for mm_hash in (FOX, ELK, CAT):
        harness.answer_pixels(mm_hash)
    assert encoded(harness.launch_encode()) == [CAT, ELK, FOX]
    harness.answer_pixels(DOG)
    assert encoded(harness.launch_encode()) == [DOG]
    assert harness.scheduler.schedule_encode() is None
    finish(harness, *requests)
    assert set(harness.worker.num_encoded.values()) == {1}


def test_a_batch_keeps_to_its_budget_and_a_picture_alone_may_exceed_it() -> None:
    for budget, sizes in ((2 * SIZE, [2, 1]), (2 * SIZE - 1, [1, 1, 1]), (3, [1, 1, 1])):
        harness = Harness(max_num_encoder_tokens=budget, encode_depth=3, num_blocks=200)
        request = with_pictures("r", CAT, DOG, ELK)
        harness.add(request)
        harness.launch_encode()
        while harness.answer_pixels():
            pass
        assert [len(harness.launch_encode().inputs) for _ in sizes] == sizes
        finish(harness, request)


def test_a_batch_is_closed_once_it_is_large_enough_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH_TOKENS", SIZE + 1)
    harness = Harness(max_num_encoder_tokens=1000, num_blocks=200)
    request = with_pictures("r", CAT, DOG, ELK)
    harness.add(request)
    harness.launch_encode()
    while harness.answer_pixels():
        pass
    assert encoded(harness.launch_encode()) == [CAT, DOG] and encoded(harness.launch_encode()) == [ELK]
    finish(harness, request)


def test_computing_begins_while_later_pictures_are_still_encoded() -> None:
    harness = Harness(max_num_encoder_tokens=SIZE, num_blocks=200, max_num_batched_tokens=100)
    request = with_pictures("r", CAT, DOG)
    harness.add(request)
    harness.launch_encode()
    while harness.answer_pixels():
        pass
    assert harness.launch_encode() and harness.launch_encode()
    harness.settle_encode()
    assert harness.launch().num_scheduled_tokens == {"r": 3 + SIZE + 3}
    assert harness.launch() is None
    finish(harness, request)


def test_a_request_with_more_pictures_than_the_cache_holds_computes_and_goes_on() -> None:
    harness = Harness(encoder_pages=2, max_num_batched_tokens=100, num_blocks=200)
    request = with_pictures("r", CAT, DOG, ELK, FOX, CAT)
    harness.add(request)
    complete(harness, CAT, DOG, ELK, FOX)
    assert cached(harness) == {CAT, DOG}  # nothing of its own is given up for what comes later
    assert harness.launch().num_scheduled_tokens == {"r": 3 * 3 + 2 * SIZE}
    assert harness.launch_encode() is None  # the step still reads them
    harness.settle()
    assert encoded(harness.launch_encode()) == [ELK, FOX]
    finish(harness, request)
    assert harness.worker.num_encoded == {CAT: 2, DOG: 1, ELK: 1, FOX: 1}


def test_a_picture_gives_way_to_an_earlier_one_of_its_own_request() -> None:
    harness = Harness(encoder_pages=1, max_num_batched_tokens=100, num_blocks=200)
    request = with_pictures("r", CAT, DOG)
    harness.add(request)
    complete(harness, DOG)  # its pixels came first, and there was room
    assert cached(harness) == {DOG}
    complete(harness, CAT)
    assert cached(harness) == {CAT}
    finish(harness, request)
    assert harness.worker.num_encoded == {CAT: 1, DOG: 2}


def test_two_requests_do_not_take_room_from_each_other_in_turn() -> None:
    harness = Harness(encoder_pages=1, max_num_batched_tokens=100, num_blocks=200)
    requests = [with_pictures("r", CAT, ELK), with_pictures("s", DOG, FOX, text=2)]
    for request in requests:
        harness.add(request)
    finish(harness, *requests)
    # Whatever came first, each is encoded at most once too often: before its turn, for room that was free.
    assert sum(harness.worker.num_encoded.values()) <= 4 + 2


def test_the_most_urgent_takes_what_only_later_ones_need_the_last_needed_first() -> None:
    harness = Harness(encoder_pages=3, max_num_batched_tokens=100, num_blocks=200)
    requests = [with_pictures("r", CAT), with_pictures("s", DOG, text=2), with_pictures("t", ELK, FOX, text=3)]
    for request in requests:
        harness.add(request)
    complete(harness, DOG, ELK, FOX)
    assert cached(harness) == {DOG, ELK, FOX}
    complete(harness, CAT)
    assert cached(harness) == {CAT, DOG, ELK}
    finish(harness, *requests)


def test_the_others_take_only_what_nobody_asks_for() -> None:
    harness = Harness(encoder_pages=2, max_num_batched_tokens=100, num_blocks=200)
    requests = [with_pictures("r", CAT), with_pictures("s", DOG, text=2), with_pictures("t", ELK, text=3)]
    for request in requests:
        harness.add(request)
    complete(harness, CAT, ELK)
    complete(harness, DOG)  # now the most urgent that is missing, but not before the cat, which is needed first
    assert cached(harness) == {CAT, DOG}
    fourth = with_pictures("u", FOX, text=4)
    harness.add(fourth)
    complete(harness, FOX)
    assert cached(harness) == {CAT, DOG}
    harness.abort("r")
    complete(harness)
    assert cached(harness) == {DOG, ELK} or cached(harness) == {DOG, FOX}  # nobody asks for the cat any more
    finish(harness, *requests[1:], fourth)


def test_nobody_overtakes_the_most_urgent_while_it_waits_for_room() -> None:
    harness = Harness(encoder_pages=3, max_num_batched_tokens=100, num_blocks=200)
    harness.add(with_pictures("reading", CAT))
    complete(harness, CAT)
    harness.launch()  # reads the cat
    requests = [with_pictures("large", DOG, text=2, size=3 * SIZE), with_pictures("small", ELK, text=3)]
    for request in requests:
        harness.add(request)
    harness.launch_encode()
    harness.answer_pixels(DOG)
    harness.answer_pixels(ELK)
    assert harness.launch_encode() is None  # a page for the elk is free, and not given
    harness.settle()
    assert encoded(harness.launch_encode()) == [DOG]
    finish(harness, *requests)


def test_a_request_that_ends_while_its_picture_is_encoded_leaves_it_to_the_next() -> None:
    harness = Harness(encoder_pages=1, max_num_batched_tokens=100, num_blocks=200)
    harness.add(with_pictures("r", CAT))
    harness.launch_encode()
    harness.answer_pixels(CAT)
    harness.launch_encode()
    harness.abort("r")
    second = with_pictures("s", CAT, text=2)
    harness.add(second)
    assert harness.launch_encode() is None and not harness.asked
    finish(harness, second)
    assert harness.worker.num_encoded == {CAT: 1} and harness.scheduler.stats.encoder_cache_hits == 1
    third = with_pictures("t", DOG)
    harness.add(third)
    finish(harness, third)  # and it goes when the room is needed


def test_a_damaged_picture_ends_its_request_and_frees_what_was_encoded_for_it() -> None:
    harness = Harness(encoder_pages=1, poison=frozenset({DOG}), max_num_batched_tokens=100, num_blocks=200)
    good = with_pictures("good", ELK, text=2)
    harness.add(with_pictures("bad", CAT, DOG))
    harness.add(good)
    harness.launch_encode()
    harness.answer_pixels(CAT)
    harness.launch_encode()
    harness.answer_pixels(DOG)
    finish(harness, good)
    assert harness.finished["bad"] is FinishReason.ERROR


def test_a_slab_that_is_short_does_not_take_what_a_batch_reads() -> None:
    harness = Harness(slots=1, num_blocks=200)
    requests = [with_pictures("first", DOG, text=2), with_pictures("second", CAT)]
    for request in requests:
        harness.add(request)
    harness.launch_encode()
    harness.answer_pixels(CAT)
    assert encoded(harness.launch_encode()) == [CAT]
    assert not harness.press() and harness.pinned == {CAT}  # though the dog, more urgent, waits for the slot
    harness.settle_encode()
    finish(harness, *requests)
    assert harness.worker.num_encoded == {CAT: 1, DOG: 1}


def test_pixels_given_up_are_asked_for_again() -> None:
    harness = Harness(slots=1, num_blocks=200)
    requests = [with_pictures("first", ELK, text=3), with_pictures("second", DOG, text=2), with_pictures("third", CAT)]
    for request in requests:
        harness.add(request)
    harness.launch_encode()
    harness.answer_pixels(ELK)
    assert encoded(harness.launch_encode()) == [ELK] and harness.launch_encode() is None
    harness.press()
    assert list(harness.asked) == [DOG]
    harness.launch_encode()
    assert list(harness.asked) == [DOG, CAT]
    finish(harness, *requests)


def cat_and_dog(name: str, dog_size: int = SIZE) -> EngineCoreRequest:
    features = [MMFeature(CAT, 0, SIZE, (1, 2, 2 * SIZE)), MMFeature(DOG, SIZE, dog_size, (1, 2, 2 * dog_size))]
    return make_request(name, [*[50] * (SIZE + dog_size), 2], features, max_tokens=1, eos=())


def test_a_picture_that_the_prefix_covers_is_not_kept_in_the_way_of_the_next() -> None:
    harness = Harness(encoder_pages=3, num_blocks=200, block_size=1, max_num_batched_tokens=100)
    harness.add(make_request("first", [*[50] * SIZE, 1], [MMFeature(CAT, 0, SIZE, (1, 2, 2 * SIZE))], eos=()))
    harness.drain()
    assert cached(harness) == {CAT}
    request = cat_and_dog("second", 3 * SIZE)  # covered up to the dog, which needs the whole cache
    harness.add(request)
    finish(harness, request)


def test_a_slot_held_for_what_a_prefix_covers_meanwhile_is_given_up_for_what_is_needed() -> None:
    harness = Harness(slots=1, num_blocks=200, block_size=1, max_num_batched_tokens=100)
    harness.add(cat_and_dog("r"))
    harness.launch_encode()
    harness.answer_pixels(CAT)
    kv = harness.scheduler.kv
    other = Request(cat_and_dog("other"), (0,))  # has computed the cat by now
    kv.allocate(other, SIZE)
    kv.free(other)
    assert harness.launch_encode() is None and list(harness.asked) == [DOG]
    assert harness.press() and harness.answer_pixels(DOG)
    harness.abort("r")
    harness.drain()


def test_the_end_of_a_batch_makes_its_room_available() -> None:
    harness = Harness(encoder_pages=1, num_blocks=200)
    harness.add(with_pictures("r", CAT))
    second = with_pictures("s", DOG, text=2)
    harness.add(second)
    harness.launch_encode()
    harness.answer_pixels(CAT)
    harness.answer_pixels(DOG)
    assert encoded(harness.launch_encode()) == [CAT]
    harness.abort("r")
    assert harness.launch_encode() is None
    harness.settle_encode()
    assert encoded(harness.launch_encode()) == [DOG]
    finish(harness, second)


def test_behind_a_picture_whose_pixels_are_on_their_way_nobody_takes_what_another_needs() -> None:
    harness = Harness(encoder_pages=1, num_blocks=200)
    requests = [with_pictures("r", CAT), with_pictures("s", DOG, text=2), with_pictures("t", ELK, text=3)]
    for request in requests:
        harness.add(request)
    complete(harness, ELK)
    harness.answer_pixels(DOG)
    assert harness.launch_encode() is None and cached(harness) == {ELK}
    finish(harness, *requests)


def test_without_a_change_nothing_is_looked_at() -> None:
    harness = Harness(num_blocks=200, max_num_batched_tokens=100)
    looks = 0
    look_ahead = harness.scheduler.encoding._look_ahead

    def count(requests):  # type: ignore[no-untyped-def]
        nonlocal looks
        looks += 1
        return look_ahead(requests)

    harness.scheduler.encoding._look_ahead = count  # type: ignore[method-assign]
    harness.add(with_pictures("r", CAT, max_tokens=60))
    for _ in range(5):
        harness.launch_encode()
    assert looks == 1
    harness.answer_pixels(CAT)
    harness.encode()
    harness.launch_encode()
    harness.launch()
    harness.settle()
    harness.launch_encode()
    before = looks
    for _ in range(20):  # decoding
        assert harness.launch() is not None
        harness.settle()
        harness.launch_encode()
    assert looks == before
    harness.drain()


def test_a_picture_whose_cached_prefix_is_lost_is_asked_for_after_all() -> None:
    harness = Harness(num_blocks=16, block_size=4, max_num_seqs=1, max_num_batched_tokens=100, depth=1)
    prompt, features = [1] * 3 + [50] * SIZE + [2] * 6, [MMFeature(CAT, 3, SIZE, (1, 2, 2 * SIZE))]
    harness.add(make_request("first", prompt, features, max_tokens=1, eos=()))
    harness.drain()
    harness.scheduler.encoder_cache.forget_unreferenced()
    long = make_request("long", [9] * 20, eos=(), max_tokens=38)  # takes all blocks there are, in the end
    harness.add(long)
    again = make_request("again", prompt, features, max_tokens=1, eos=())
    harness.add(again)
    assert harness.launch_encode() is None and not harness.asked  # its prefix, the picture included, is cached
    for _ in range(37):
        harness.launch()
        harness.settle()
        harness.launch_encode()
    assert list(harness.asked) == [CAT]
    harness.drain()
    for request in (again, long):
        assert harness.outputs[request.request_id] == expected_output(request)


def test_asking_ahead_is_bounded_but_not_for_the_most_urgent_nor_for_who_runs() -> None:
    harness = Harness(num_blocks=200, max_ahead_patches=0, max_num_seqs=2)
    requests = [with_pictures(str(i), mm_hash, text=i) for i, mm_hash in enumerate((CAT, DOG, ELK, FOX))]
    for request in requests:
        harness.add(request)
    harness.launch_encode()
    assert list(harness.asked) == [CAT]
    harness.launch()  # two run: each up to its picture
    harness.launch_encode()
    assert list(harness.asked) == [CAT, DOG]
    finish(harness, *requests)
