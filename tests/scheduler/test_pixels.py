"""What the core asks for, and the order in which it is told."""

from __future__ import annotations

from mmv1.scheduler.pixels import PixelLedger
from mmv1.types import FeatureFailed, FeatureReady, MMFeature, PixelRequest

CAT, DOG = (MMFeature(name * 32, 0, 2, (1, 2, 4)) for name in (b"c", b"d"))  # eight patches each


def test_a_picture_is_asked_for_once_however_many_want_it() -> None:
    ledger = PixelLedger(100)
    for request_id in ("r", "s", "r"):
        ledger.want(CAT, request_id, ahead=False)
    assert ledger.take_messages() == ([PixelRequest(CAT.mm_hash, 1)], [])
    ledger.forget_request("r")
    assert ledger.take_messages() == ([], [])
    ledger.forget_request("s")
    assert ledger.take_messages() == ([], [CAT.mm_hash])
    ledger.check_integrity()


def test_asking_ahead_is_bounded_and_need_is_not() -> None:
    ledger = PixelLedger(max_ahead_patches=8)
    assert ledger.want(CAT, "r", ahead=True) is not None
    assert ledger.want(DOG, "s", ahead=True) is None
    assert ledger.want(DOG, "s", ahead=False) is not None
    assert ledger.want(DOG, "t", ahead=True) is not None  # asked for already: costs nothing


def test_what_is_given_up_before_it_was_sent_is_never_asked_for() -> None:
    ledger = PixelLedger(100)
    ledger.want(CAT, "r", ahead=False)
    ledger.forget_request("r")
    assert ledger.take_messages() == ([], [CAT.mm_hash])  # a request here would pin a slot for ever
    ledger.want(CAT, "r", ahead=False)
    ledger.take_messages()
    ledger.forget_request("r")
    ledger.want(CAT, "s", ahead=False)
    assert ledger.take_messages() == ([PixelRequest(CAT.mm_hash, 3)], [CAT.mm_hash])


def test_an_answer_to_an_older_ticket_is_dropped() -> None:
    ledger = PixelLedger(100)
    ledger.want(CAT, "r", ahead=False)
    ledger.forget_request("r")
    ledger.want(CAT, "s", ahead=False)
    assert not ledger.ready(FeatureReady(CAT.mm_hash, 1, 0, 8))
    assert ledger.failed(FeatureFailed(CAT.mm_hash, 1, "damaged", "invalid_image")) == []
    assert ledger.ready(FeatureReady(CAT.mm_hash, 2, 4096, 8))
    state = ledger.get(CAT.mm_hash)
    assert state is not None and state.offset == 4096


def test_a_slot_is_released_when_the_batch_that_reads_it_is_done_and_not_before() -> None:
    ledger = PixelLedger(100)
    ledger.want(CAT, "r", ahead=False)
    ledger.ready(FeatureReady(CAT.mm_hash, 1, 0, 8))
    ledger.take_messages()
    state = ledger.get(CAT.mm_hash)
    assert state is not None
    state.is_encoding = True
    ledger.forget_request("r")  # aborted while the batch is in flight
    assert ledger.take_messages() == ([], [])
    ledger.encoded(CAT.mm_hash)
    assert ledger.take_messages() == ([], [CAT.mm_hash]) and ledger.num_pending == 0
    ledger.check_integrity()


def test_a_failure_after_the_pixels_came_is_dropped() -> None:
    ledger = PixelLedger(100)
    ledger.want(CAT, "r", ahead=False)
    ledger.ready(FeatureReady(CAT.mm_hash, 1, 0, 8))
    assert ledger.failed(FeatureFailed(CAT.mm_hash, 1, "damaged", "invalid_image")) == []
    assert ledger.get(CAT.mm_hash) is not None


def test_failure_names_everyone_who_wanted_it() -> None:
    ledger = PixelLedger(100)
    for request_id in ("r", "s"):
        ledger.want(CAT, request_id, ahead=False)
        ledger.want(DOG, request_id, ahead=False)
    assert sorted(ledger.failed(FeatureFailed(CAT.mm_hash, 1, "damaged", "invalid_image"))) == ["r", "s"]
    assert ledger.num_pending == 1
    ledger.check_integrity()


def test_when_the_slab_is_short_the_most_urgent_picture_gets_room() -> None:
    ledger = PixelLedger(100)
    elk, fox = (MMFeature(name * 32, 0, 2, (1, 2, 4)) for name in (b"e", b"f"))
    for feature, request_id in ((CAT, "1"), (DOG, "2"), (elk, "3"), (fox, "4")):
        ledger.want(feature, request_id, ahead=False)
    ledger.ready(FeatureReady(CAT.mm_hash, 1, 0, 8))
    ledger.ready(FeatureReady(elk.mm_hash, 3, 8, 8))
    ledger.take_messages()
    ledger.make_room(lambda request_id, mm_hash: (int(request_id),))
    # The first is here and stays; the second is awaited, and all that is less urgent goes, held or awaited.
    assert ledger.take_messages() == ([], [elk.mm_hash, fox.mm_hash])
    assert ledger.get(CAT.mm_hash) is not None and ledger.get(DOG.mm_hash) is not None
    ledger.make_room(lambda request_id, mm_hash: (int(request_id),))
    assert ledger.take_messages() == ([], [])
    ledger.check_integrity()


def test_making_room_leaves_what_a_batch_reads_and_does_nothing_when_nothing_is_awaited() -> None:
    ledger = PixelLedger(100)
    ledger.want(CAT, "9", ahead=False)
    ledger.ready(FeatureReady(CAT.mm_hash, 1, 0, 8))
    ledger.make_room(lambda request_id, mm_hash: (int(request_id),))
    state = ledger.get(CAT.mm_hash)
    assert state is not None
    ledger.want(DOG, "1", ahead=False)
    state.is_encoding = True
    ledger.make_room(lambda request_id, mm_hash: (int(request_id),))
    assert ledger.get(CAT.mm_hash) is not None
    state.is_encoding = False
    ledger.make_room(lambda request_id, mm_hash: (int(request_id),))
    assert ledger.get(CAT.mm_hash) is None
