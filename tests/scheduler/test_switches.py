"""Mechanisms switched off: the answers are the same, and what was switched off does not happen."""

from __future__ import annotations

import pytest

from mmv1.types import FinishReason
from tests.scheduler.harness import Harness
from tests.scheduler.test_encoding import CAT, DOG, ELK, cached, complete, finish, with_pictures
from tests.simulation import make_request


def text(name: str, length: int) -> object:
    return make_request(name, [*range(1, length + 1)], max_tokens=3, eos=())


def test_without_chunked_prefill_a_prompt_runs_whole_when_there_is_room_for_all_of_it() -> None:
    harness = Harness(max_num_batched_tokens=16, chunked_prefill=False, prefix_caching=False)
    requests = [text("r", 10), text("s", 10), text("t", 3)]
    for request in requests:
        harness.add(request)  # type: ignore[arg-type]
    first, second = harness.launch(), harness.launch()
    assert first is not None and second is not None
    assert first.num_scheduled_tokens == {"r": 10}  # t does not overtake s
    assert second.num_scheduled_tokens == {"r": 1, "s": 10, "t": 3}
    finish(harness, *requests)  # type: ignore[arg-type]
    cut = Harness(max_num_batched_tokens=16, prefix_caching=False)
    for request in requests:
        cut.add(request)  # type: ignore[arg-type]
    step = cut.launch()
    assert step is not None and step.num_scheduled_tokens == {"r": 10, "s": 6}


def test_without_chunked_prefill_a_prompt_waits_for_all_its_pictures() -> None:
    harness = Harness(max_num_batched_tokens=64, num_blocks=200, chunked_prefill=False)
    request = with_pictures("r", CAT, DOG)
    harness.add(request)
    complete(harness, CAT)
    assert harness.launch() is None
    complete(harness, DOG)
    step = harness.launch()
    assert step is not None and step.num_scheduled_tokens == {"r": len(request.prompt_token_ids)}
    finish(harness, request)


def test_pictures_that_do_not_fit_together_are_refused_without_chunked_prefill() -> None:
    harness = Harness(encoder_pages=2, max_num_batched_tokens=64, num_blocks=200, chunked_prefill=False)
    harness.add(with_pictures("r", CAT, DOG, ELK))
    (failed,) = harness.scheduler.take_failed()
    assert (failed.request_id, failed.finish_reason, failed.error_code) == ("r", FinishReason.ERROR, "too_many_images")
    fits = with_pictures("s", CAT, DOG, CAT)
    harness.add(fits)
    complete(harness, CAT, DOG)
    finish(harness, fits)


@pytest.mark.parametrize("keeps", [True, False])
def test_without_the_encoder_cache_an_embedding_is_dropped_when_nobody_needs_it(keeps: bool) -> None:
    harness = Harness(max_num_batched_tokens=64, num_blocks=200, prefix_caching=False, keeps_embeddings=keeps)
    both = [with_pictures("r", CAT), with_pictures("s", CAT, DOG, text=2)]
    for request in both:
        harness.add(request)
    complete(harness, CAT)
    assert cached(harness) == {CAT}
    complete(harness, DOG)
    finish(harness, *both)
    assert harness.worker.num_encoded[CAT] == 1  # s was here, and needed it too
    harness.scheduler.schedule_encode()
    assert cached(harness) == ({CAT, DOG} if keeps else set())
    again = with_pictures("t", CAT, text=3)
    harness.add(again)
    if not keeps:
        complete(harness, CAT)
    finish(harness, again)
    assert harness.worker.num_encoded[CAT] == (1 if keeps else 2)
    harness.scheduler.check_integrity()
