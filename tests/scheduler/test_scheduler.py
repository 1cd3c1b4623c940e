"""Single decisions of the scheduler that the property test would not point at by name."""

from __future__ import annotations

from mmv1.types import EngineCoreRequest, FinishReason, MMFeature
from tests.scheduler.harness import Harness
from tests.simulation import expected_output, make_request

CAT, DOG = b"c" * 32, b"d" * 32


def picture(mm_hash: bytes, offset: int, num_tokens: int) -> MMFeature:
    return MMFeature(mm_hash, offset, num_tokens, (1, 2, 2 * num_tokens))


def with_picture(
    name: str,
    mm_hash: bytes = CAT,
    *,
    before: int = 6,
    size: int = 8,
    after: int = 4,
    text: int = 1,
    max_tokens: int = 3,
) -> EngineCoreRequest:
    prompt = [text] * before + [50] * size + [text] * after
    return make_request(name, prompt, [picture(mm_hash, before, size)], max_tokens=max_tokens, eos=())


def test_prompts_are_chunked_and_mixed_with_decodes_under_one_budget() -> None:
    harness = Harness(max_num_batched_tokens=10, depth=1)
    harness.add(make_request("short", [1, 2, 3], eos=(), max_tokens=9))
    harness.add(make_request("long", list(range(25)), eos=()))
    assert harness.launch().num_scheduled_tokens == {"short": 3, "long": 7}
    harness.settle()
    assert harness.launch().num_scheduled_tokens == {"short": 1, "long": 9}
    harness.settle()
    assert harness.launch().num_scheduled_tokens == {"short": 1, "long": 9}
    harness.settle()
    assert harness.launch().num_scheduled_tokens == {"short": 1, "long": 1}
    harness.drain()


def test_the_next_step_is_scheduled_before_the_token_it_needs_is_known() -> None:
    harness = Harness()
    request = make_request("r", [1, 2, 3], eos=(), max_tokens=4)
    harness.add(request)
    assert harness.launch().num_scheduled_tokens == {"r": 3}
    assert harness.launch().num_scheduled_tokens == {"r": 1}  # the first token is still in flight
    assert harness.launch() is None
    harness.settle()
    assert harness.launch().num_scheduled_tokens == {"r": 1}
    harness.drain()
    assert harness.outputs["r"] == expected_output(request)


def test_nothing_is_computed_past_max_tokens() -> None:
    harness = Harness()
    harness.add(make_request("r", [1, 2, 3], eos=(), max_tokens=2))
    assert harness.launch() and harness.launch()
    harness.settle()
    assert harness.launch() is None  # both tokens are sampled or about to be
    harness.drain()
    assert len(harness.outputs["r"]) == 2 and harness.finished["r"] is FinishReason.LENGTH


def test_a_known_request_is_described_by_differences_only() -> None:
    harness = Harness(block_size=4, depth=1)
    harness.add(make_request("r", [1, 2, 3], eos=(), max_tokens=8))
    steps = []
    while (step := harness.launch()) is not None:
        steps.append(step)
        harness.settle()
    assert [len(step.new_requests) for step in steps] == [1] + [0] * (len(steps) - 1)
    # Two blocks more over the whole life: at positions 4 and 8.
    assert [len(step.cached_requests.request_ids) for step in steps] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_text_before_a_picture_is_computed_while_its_pixels_are_on_their_way() -> None:
    harness = Harness(max_num_batched_tokens=64)
    request = with_picture("r")
    harness.add(request)
    assert harness.launch().num_scheduled_tokens == {"r": 6}
    assert harness.launch() is None and list(harness.asked) == [CAT]
    harness.answer_pixels(CAT)
    step = harness.launch()
    assert step.num_scheduled_tokens == {"r": 12} and [item.mm_hash for item in step.encoder_inputs] == [CAT]
    harness.drain()
    assert harness.outputs["r"] == expected_output(request)


def test_a_request_that_waits_for_pixels_does_not_hold_up_the_others() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.add(with_picture("picture"))
    text = make_request("text", [3, 2, 1], eos=(), max_tokens=3)
    harness.add(text)
    harness.launch()
    harness.settle()
    while harness.launch() or harness.settle():
        pass
    assert harness.outputs["text"] == expected_output(text) and "picture" not in harness.finished
    harness.drain()


def test_one_picture_for_many_requests_is_asked_for_and_encoded_once() -> None:
    harness = Harness(num_blocks=200, max_num_batched_tokens=64)
    for i in range(8):
        harness.add(with_picture(f"r{i}", text=i))
    harness.drain()
    assert harness.worker.num_encoded == {CAT: 1} and harness.scheduler.stats.num_images_encoded == 1
    assert harness.scheduler.pixels.num_requests == 1
    assert (harness.scheduler.stats.encoder_cache_queries, harness.scheduler.stats.encoder_cache_hits) == (8, 7)


def test_a_picture_covered_by_the_prefix_is_neither_asked_for_nor_encoded() -> None:
    harness = Harness(block_size=2, max_num_batched_tokens=64)
    harness.add(with_picture("first"))
    harness.drain()
    harness.scheduler.encoder_cache.forget_unreferenced()
    harness.add(make_request("second", [1] * 6 + [50] * 8 + [2] * 5, [picture(CAT, 6, 8)], eos=()))
    harness.drain()
    assert harness.cached["second"] == 14
    assert harness.worker.num_encoded == {CAT: 1} and harness.scheduler.pixels.num_requests == 1


def test_a_hit_that_ends_inside_a_picture_needs_the_picture_again() -> None:
    harness = Harness(block_size=4, num_blocks=64, max_num_batched_tokens=64)
    harness.add(with_picture("first", before=6, size=8, after=4))
    harness.drain()
    harness.scheduler.encoder_cache.forget_unreferenced()
    second = make_request("second", [1] * 6 + [50] * 8 + [2], [picture(CAT, 6, 8)], eos=())
    harness.add(second)
    harness.drain()
    assert harness.cached["second"] == 12 and harness.worker.num_encoded == {CAT: 2}
    assert harness.outputs["second"] == expected_output(second)


def test_an_encoder_hit_needs_no_pixels() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.add(with_picture("first", text=1))
    harness.drain()
    second = with_picture("second", text=2)
    harness.add(second)
    harness.drain()
    assert harness.cached["second"] == 0 and harness.worker.num_encoded == {CAT: 1}
    assert harness.scheduler.pixels.num_requests == 1
    assert harness.outputs["second"] == expected_output(second)


def test_pictures_of_waiting_requests_are_asked_for_and_encoded_ahead() -> None:
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=64, depth=1)
    harness.add(make_request("running", [1, 2, 3], eos=(), max_tokens=50))
    harness.add(with_picture("waiting", DOG))
    harness.launch()
    assert list(harness.asked) == [DOG]
    harness.settle()
    harness.answer_pixels(DOG)
    step = harness.launch()
    assert step.num_scheduled_tokens == {"running": 1} and [item.mm_hash for item in step.encoder_inputs] == [DOG]
    harness.drain()
    assert harness.worker.num_encoded == {DOG: 1}


def test_a_damaged_picture_ends_its_requests_and_no_others() -> None:
    harness = Harness(poison=frozenset({CAT}), max_num_batched_tokens=64)
    good = with_picture("good", DOG)
    for request in (with_picture("bad"), good, with_picture("bad too", text=5)):
        harness.add(request)
    harness.drain()
    assert {name for name, reason in harness.finished.items() if reason is FinishReason.ERROR} == {"bad", "bad too"}
    assert harness.outputs["good"] == expected_output(good) and harness.outputs["bad"] == []


def test_preemption_takes_the_last_to_come_and_loses_nothing() -> None:
    harness = Harness(num_blocks=8, block_size=4, max_num_batched_tokens=64)
    requests = [make_request(name, [i] * 6, eos=(), max_tokens=14) for i, name in enumerate(("old", "young"))]
    for request in requests:
        harness.add(request)
    harness.drain()
    assert harness.scheduler.stats.num_preemptions >= 1
    for request in requests:
        assert harness.outputs[request.request_id] == expected_output(request)
    resumed = [new.request_id for step in harness.worker.steps for new in step.new_requests]
    assert resumed.count("old") == 1 and resumed.count("young") >= 2


def test_priority_goes_before_arrival() -> None:
    harness = Harness(max_num_seqs=1, policy="priority", max_num_batched_tokens=64)
    for name, priority in (("later", 5), ("now", 0), ("soon", 1)):
        harness.add(make_request(name, [1, 2], eos=(), max_tokens=2, priority=priority))
    harness.drain()
    assert [new.request_id for step in harness.worker.steps for new in step.new_requests] == ["now", "soon", "later"]


def test_an_aborted_request_lets_go_of_everything_at_once() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(with_picture("r", size=8))
    harness.launch()
    harness.launch()
    harness.answer_pixels()
    harness.launch()
    harness.abort("r")
    scheduler = harness.scheduler
    assert scheduler.kv.num_used_blocks == 0 and scheduler.encoder_cache.num_references == 0
    while harness.settle():
        pass
    scheduler.check_integrity()
    assert scheduler.pixels.num_pending == 0 and not scheduler.has_requests


def test_a_late_answer_to_a_withdrawn_pixel_request_is_dropped() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.add(with_picture("r"))
    harness.launch()
    ticket = harness.asked[CAT]
    harness.abort("r")
    harness.add(with_picture("s"))
    while harness.settle() or harness.launch():
        pass
    assert harness.asked[CAT] > ticket
    harness.asked[CAT], newer = ticket, harness.asked[CAT]
    harness.answer_pixels(CAT)  # the old answer
    assert harness.launch() is None
    harness.asked[CAT] = newer
    harness.drain()
    assert len(harness.outputs["s"]) == 3


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    harness = Harness(num_blocks=64, block_size=4, max_num_batched_tokens=64)
    request = make_request("r", [1, 2, 3, 4, 5], eos=(), max_tokens=6)
    harness.add(request)
    harness.launch()
    harness.scheduler._preempt(harness.scheduler.running[0])
    assert harness.launch() is None  # it cannot be described to the workers: its newest token's id is not known yet
    harness.settle()
    assert harness.launch().new_requests[0].token_ids == [1, 2, 3, 4, 5, *harness.outputs["r"]]
    harness.drain()
    assert harness.outputs["r"] == expected_output(request)


def test_a_step_from_before_a_preemption_drops_no_reference_taken_since() -> None:
    harness = Harness(block_size=4, max_num_batched_tokens=16, prefix_caching=False)
    request = with_picture("r", before=2, size=8, after=20)
    harness.add(request)
    harness.launch()  # the text before the picture
    harness.settle()
    harness.answer_pixels(CAT)
    harness.launch()  # past the picture's end, and not yet executed
    harness.scheduler._preempt(harness.scheduler.running[0])
    harness.launch()  # the same chunk again
    cache = harness.scheduler.encoder_cache
    assert cache.num_references == 1
    harness.settle()
    assert cache.num_references == 1  # the later step still needs it
    harness.settle()
    assert cache.num_references == 0
    harness.drain()
    assert harness.outputs["r"] == expected_output(request)
