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
    assert harness.launch_encode() is None and list(harness.asked) == [CAT]
    assert harness.launch().num_scheduled_tokens == {"r": 6}
    assert harness.launch() is None
    harness.answer_pixels(CAT)
    assert [item.mm_hash for item in harness.launch_encode().inputs] == [CAT]
    assert harness.launch() is None  # being encoded is not enough
    harness.settle_encode()
    assert harness.launch().num_scheduled_tokens == {"r": 12}
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
    assert harness.launch_encode() is None and list(harness.asked) == [DOG]
    harness.settle()
    harness.answer_pixels(DOG)
    assert [item.mm_hash for item in harness.launch_encode().inputs] == [DOG]
    assert harness.launch().num_scheduled_tokens == {"running": 1}  # decoding goes on beside it
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
    harness.encode()
    harness.answer_pixels()
    harness.launch_encode()
    harness.abort("r")
    scheduler = harness.scheduler
    assert scheduler.kv.num_used_blocks == 0 and scheduler.pixels.num_pending == 1  # its pixels are being read
    while harness.settle() or harness.settle_encode():
        pass
    scheduler.check_integrity()
    assert scheduler.pixels.num_pending == 0 and not scheduler.has_requests


def test_a_late_answer_to_a_withdrawn_pixel_request_is_dropped() -> None:
    harness = Harness(max_num_batched_tokens=64)
    harness.add(with_picture("r"))
    harness.launch_encode()
    ticket = harness.asked[CAT]
    harness.abort("r")
    harness.add(with_picture("s"))
    harness.launch_encode()
    assert harness.asked[CAT] > ticket
    harness.asked[CAT], newer = ticket, harness.asked[CAT]
    harness.answer_pixels(CAT)  # the old answer
    assert harness.launch_encode() is None
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


def test_requests_that_wait_for_one_picture_behind_one_beginning_compute_it_once() -> None:
    harness = Harness(num_blocks=200, block_size=4, max_num_batched_tokens=400, depth=1)
    prompt = [1] * 6 + [50] * 40 + [2] * 3
    requests = [make_request(f"r{i}", [*prompt, i], [picture(CAT, 6, 40)], max_tokens=3, eos=()) for i in range(5)]
    for request in requests:
        harness.add(request)
    harness.launch_encode()
    first = harness.launch()
    assert first.num_scheduled_tokens == {"r0": 6, "r1": 2, "r2": 2, "r3": 2, "r4": 2}  # a block of the text is found
    harness.answer_pixels(CAT)
    harness.encode()
    harness.settle()
    step = harness.launch()
    # 46 tokens before the text behind the picture: 48 of the 50 fill blocks, which the first fills in the same step.
    assert step.num_scheduled_tokens == {"r0": 44, "r1": 2, "r2": 2, "r3": 2, "r4": 2}
    assert step.finished_request_ids == [new.request_id for new in step.new_requests] == ["r1", "r2", "r3", "r4"]
    assert harness.scheduler.kv.num_used_blocks == 12 + 5
    harness.drain()
    for request in requests:
        assert harness.outputs[request.request_id] == expected_output(request)
    # Of the 48, each had computed two of the text itself.
    assert harness.cached == {"r0": 0, "r1": 46, "r2": 46, "r3": 46, "r4": 46}
    assert harness.scheduler.stats.prefix_cache_hits == 4 * 46
    assert harness.worker.num_encoded == {CAT: 1}


def test_a_request_that_adopted_a_prefix_may_end_before_the_workers_know_it_again() -> None:
    harness = Harness(num_blocks=200, block_size=4, max_num_batched_tokens=400, depth=1)
    prompt = [1] * 6 + [50] * 8 + [2] * 6 + [50] * 8 + [3]
    for i in range(3):
        harness.add(make_request(f"r{i}", [*prompt, i], [picture(CAT, 6, 8), picture(DOG, 20, 8)], eos=()))
    harness.launch_encode()
    harness.launch()
    harness.answer_pixels(CAT)
    harness.encode()
    harness.settle()
    harness.launch_encode()
    # All full blocks up to the dog: the others adopt them, and have nothing to compute themselves.
    step = harness.launch()
    assert step.num_scheduled_tokens == {"r0": 14} and step.finished_request_ids == ["r1", "r2"]
    assert harness.scheduler.encoding.changed  # two requests need no cat any more
    harness.settle()
    assert harness.launch() is None
    harness.abort("r1")
    harness.drain()
    ended = [request_id for step in harness.worker.steps for request_id in step.finished_request_ids]
    described = [new.request_id for step in harness.worker.steps for new in step.new_requests]
    assert ended.count("r1") == described.count("r1")


def test_a_picture_read_by_a_step_in_flight_stays_whatever_becomes_of_its_request() -> None:
    """What the step writes is findable by its hash already: garbage there would be another's answer."""
    harness = Harness(block_size=4, encoder_pages=1, max_num_batched_tokens=16)
    harness.add(with_picture("r", before=2, size=8, after=20))
    harness.launch_encode()
    harness.answer_pixels(CAT)
    harness.encode()
    harness.launch()  # over the picture, and not yet executed
    harness.abort("r")
    other = with_picture("s", DOG, text=4)
    harness.add(other)
    harness.launch_encode()
    harness.answer_pixels(DOG)
    assert harness.launch_encode() is None and CAT in harness.scheduler.encoder_cache
    harness.settle()
    batch = harness.launch_encode()
    assert batch.free_mm_hashes == [CAT] and [item.mm_hash for item in batch.inputs] == [DOG]
    harness.drain()
    assert harness.outputs["s"] == expected_output(other)


def test_a_preempted_request_finds_the_picture_that_was_being_encoded() -> None:
    harness = Harness(block_size=4, max_num_batched_tokens=64)
    request = with_picture("r")
    harness.add(request)
    harness.launch_encode()
    harness.launch()  # the text before the picture
    harness.answer_pixels(CAT)
    harness.launch_encode()
    harness.scheduler._preempt(harness.scheduler.running[0])
    harness.drain()
    assert harness.outputs["r"] == expected_output(request) and harness.worker.num_encoded == {CAT: 1}
