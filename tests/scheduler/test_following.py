"""Steps behind encode batches: when there is nothing else to run, a step may read pictures that are still being encoded."""

from __future__ import annotations

import pytest

from tests.scheduler.harness import Harness
from tests.scheduler.test_encoding import CAT, DOG, SIZE, finish, with_pictures
from tests.simulation import make_request

ALL = 2 * SIZE


def encoding(harness: Harness, *hashes: bytes) -> None:
    """Submit a batch of these, of which the pixels have been asked for."""
    harness.launch_encode()
    for mm_hash in hashes:
        assert harness.answer_pixels(mm_hash)
    assert harness.launch_encode() is not None


def behind_its_text(*hashes: bytes, max_followed_tokens: int = ALL) -> tuple[Harness, object]:
    """A request whose text before its pictures is computed, and whose pictures are being encoded."""
    harness = Harness(max_num_batched_tokens=64, num_blocks=200, max_followed_tokens=max_followed_tokens)
    request = with_pictures("r", *hashes)
    harness.add(request)
    assert harness.launch() is not None and harness.settle()
    encoding(harness, *hashes)
    return harness, request


def test_an_idle_engine_launches_the_step_while_the_pictures_are_encoded() -> None:
    harness, request = behind_its_text(CAT, DOG)
    step = harness.launch()
    assert step is not None and step.after_batch == 1
    assert step.num_scheduled_tokens == {"r": SIZE + 3 + SIZE + 1}
    assert not harness.execute()  # not before the batch has been launched
    assert harness.start_encode() and harness.settle()  # its result may be known before the batch's
    harness.scheduler.check_integrity()
    assert harness.scheduler.encoder_cache.num_held == 2  # not complete, so it stays, although nothing reads it any more
    finish(harness, request)  # type: ignore[arg-type]
    assert harness.scheduler.encoder_cache.num_held == 0


def test_what_a_step_behind_a_batch_reads_is_not_evicted_when_the_batch_is_done() -> None:
    harness, request = behind_its_text(CAT)
    assert harness.launch() is not None
    assert harness.settle_encode()
    assert harness.scheduler.encoder_cache.num_held == 1
    finish(harness, request)  # type: ignore[arg-type]


def test_later_steps_follow_no_batch_that_is_done() -> None:
    harness, request = behind_its_text(CAT)
    assert harness.launch() is not None
    assert harness.settle_encode() and harness.settle()
    step = harness.launch()
    assert step is not None and step.after_batch == 0
    finish(harness, request)  # type: ignore[arg-type]


def test_not_while_anything_else_can_run() -> None:
    harness, request = behind_its_text(CAT)
    other = make_request("other", [1, 2, 3], max_tokens=4, eos=())
    harness.add(other)
    step = harness.launch()
    assert step is not None and (step.num_scheduled_tokens, step.after_batch) == ({"other": 3}, 0)
    assert harness.settle()
    step = harness.launch()
    assert step is not None and (step.num_scheduled_tokens, step.after_batch) == ({"other": 1}, 0)
    finish(harness, request, other)  # type: ignore[arg-type]


def test_not_behind_a_step_in_flight() -> None:
    harness = Harness(max_num_batched_tokens=64, num_blocks=200, max_followed_tokens=ALL)
    request = with_pictures("r", CAT)
    harness.add(request)
    assert harness.launch() is not None
    encoding(harness, CAT)
    assert harness.launch() is None
    assert harness.settle()
    assert harness.launch() is not None
    finish(harness, request)


def test_not_behind_a_small_batch_that_stands_behind_another() -> None:
    harness, request = behind_its_text(CAT, max_followed_tokens=SIZE)
    other = with_pictures("s", DOG, text=2)
    harness.add(other)
    assert harness.launch() is not None and harness.settle()
    encoding(harness, DOG)
    assert harness.launch() is None  # 2 * SIZE tokens are before it
    assert harness.settle_encode()
    step = harness.launch()
    assert step is not None and step.after_batch == 0  # what is complete goes first,
    assert harness.settle()
    while (step := harness.launch()) is not None and not step.after_batch:
        assert harness.settle()
    assert step is not None and step.after_batch == 2  # and then what only DOG's batch is before
    finish(harness, request, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [0, ALL - 1])
def test_not_behind_a_large_batch(most: int) -> None:
    harness, request = behind_its_text(CAT, DOG, max_followed_tokens=most)
    assert harness.launch() is None
    finish(harness, request)  # type: ignore[arg-type]
