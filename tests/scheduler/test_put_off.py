"""A short text before a picture that is not there yet is put off as long as others have work, and never held up by that."""

from __future__ import annotations

from mmv1.scheduler import scheduler
from mmv1.types import EngineCoreRequest, MMFeature
from tests.scheduler.harness import Harness
from tests.scheduler.test_encoding import CAT, SIZE, complete, finish
from tests.simulation import make_request


def behind_text(name: str, mm_hash: bytes, num_tokens: int) -> EngineCoreRequest:
    prompt = [1] * num_tokens + [50] * SIZE + [2]
    return make_request(name, prompt, [MMFeature(mm_hash, num_tokens, SIZE, (1, 2, 2 * SIZE))], max_tokens=3, eos=())


def decoding(**settings: int) -> tuple[Harness, EngineCoreRequest]:
    """With a request that generates."""
    harness = Harness(max_num_batched_tokens=256, num_blocks=400, **settings)
    request = make_request("text", [1, 2, 3], max_tokens=40, eos=())
    harness.add(request)
    assert harness.launch() is not None and harness.settle()
    return harness, request


def scheduled(harness: Harness) -> dict[str, int]:
    step = harness.launch()
    assert step is not None and harness.settle()
    return step.num_scheduled_tokens


def test_it_comes_with_its_picture() -> None:
    harness, text = decoding()
    request = behind_text("r", CAT, 20)
    harness.add(request)
    assert scheduled(harness) == {"text": 1}
    complete(harness, CAT)
    assert scheduled(harness) == {"text": 1, "r": 20 + SIZE + 1}
    finish(harness, text, request)


def test_a_long_text_is_begun_at_once() -> None:
    harness, text = decoding()
    request = behind_text("r", CAT, scheduler._SHORT_TEXT + 1)
    harness.add(request)
    assert scheduled(harness) == {"text": 1, "r": scheduler._SHORT_TEXT + 1}
    finish(harness, text, request)


def test_an_engine_without_other_work_begins_them_all_at_once() -> None:
    harness = Harness(max_num_batched_tokens=256, num_blocks=400, prefix_caching=False)
    requests = [behind_text(f"r{i}", bytes([i]) * 32, 5) for i in range(3)]
    for request in requests:
        harness.add(request)
    assert scheduled(harness) == {"r0": 5, "r1": 5, "r2": 5}
    finish(harness, *requests)


def test_many_that_wait_for_pictures_hold_up_nobody() -> None:
    harness, text = decoding(max_num_seqs=200)
    requests = [behind_text(f"r{i}", bytes([i]) * 32, 2) for i in range(scheduler._MAX_PASSED_OVER + 6)]
    last = make_request("last", [4, 5], max_tokens=2, eos=())
    for request in (*requests, last):
        harness.add(request)
    step = scheduled(harness)
    assert step.keys() == {"text", "last"} | {request.request_id for request in requests[scheduler._MAX_PUT_OFF :]}
    finish(harness, text, last, *requests)
