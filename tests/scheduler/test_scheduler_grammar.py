"""Requests that follow a grammar among others: each mask is of the output so far, whatever the schedule, preemptions included."""

from __future__ import annotations

import random

import pytest

from mmv1.types import EngineCoreRequest, FinishReason
from tests.scheduler.harness import Harness
from tests.simulation import EOS, VOCAB, expected_output, make_prompt, make_request


def mask_after(output: list[int]) -> bytes:
    """A rule that every token of the output matters to."""
    allowed = [token for token in range(VOCAB) if (token + sum(output) + len(output)) % 3 == 0 or token == EOS]
    mask = bytearray(8)
    for token in allowed:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


class Matcher:
    """Follows `mask_after`; gives up behind `limit` tokens."""

    def __init__(self, limit: int = 1000) -> None:
        self.output: list[int] = []
        self.error = ""
        self.limit = limit
        self.num_masks = 0

    def mask(self) -> bytes:
        self.num_masks += 1
        return mask_after(self.output)

    def advance(self, token_id: int) -> bool:
        mask = mask_after(self.output)
        if len(self.output) >= self.limit or not mask[token_id // 8] >> token_id % 8 & 1:
            self.error = "not by this grammar"
            return False
        self.output.append(token_id)
        return True


def add(harness: Harness, request: EngineCoreRequest, matcher: Matcher) -> None:
    harness.outputs[request.request_id] = []
    harness.scheduler.add_request(request, matcher)


@pytest.mark.parametrize("seed", range(60))
def test_every_output_follows_its_grammar(seed: int) -> None:
    rng = random.Random(seed)
    harness = Harness(
        num_blocks=rng.choice([14, 20, 64]), block_size=rng.choice([2, 4]), max_num_seqs=rng.choice([2, 6]),
        max_num_batched_tokens=rng.choice([3, 16, 64]), prefix_caching=rng.random() < 0.5, depth=2, seed=seed,
    )  # fmt: skip
    requests, matchers = [], {}
    for i in range(8):
        prompt, features = make_prompt(rng, [], max_text=12)
        requests.append(make_request(f"r{i}", prompt, features, max_tokens=rng.randrange(1, 14)))
        if i % 3:
            matchers[f"r{i}"] = Matcher()
            add(harness, requests[-1], matchers[f"r{i}"])
        else:
            harness.add(requests[-1])
        for _ in range(rng.randrange(6)):
            harness.turn()
    harness.drain()
    for request in requests:
        matcher = matchers.get(request.request_id)
        output = harness.outputs[request.request_id]
        assert output == expected_output(request, mask_after if matcher else None)
        if matcher:
            assert matcher.output == output and matcher.num_masks == len(output)


def test_preemptions_happen_in_the_test_above() -> None:
    """Where memory is short, requests that follow a grammar lose their KV while a token of theirs is in flight."""
    harness = Harness(num_blocks=12, block_size=2, max_num_seqs=4, depth=2, seed=1)
    requests = [make_request(f"r{i}", [1 + i, 2, 3], max_tokens=12, eos=()) for i in range(3)]
    for request in requests:
        add(harness, request, Matcher())
    harness.drain()
    assert harness.scheduler.stats.num_preemptions > 0
    for request in requests:
        assert harness.outputs[request.request_id] == expected_output(request, mask_after)


def test_others_go_on_while_its_newest_token_is_in_flight() -> None:
    harness = Harness(depth=2)
    add(harness, make_request("g", [1, 2], max_tokens=4, eos=()), Matcher())
    harness.add(make_request("f", [3, 4], max_tokens=4, eos=()))
    first, second = harness.launch(), harness.launch()
    assert first is not None and second is not None
    assert set(first.num_scheduled_tokens) == {"g", "f"} and set(first.token_masks) == {"g"}
    assert set(second.num_scheduled_tokens) == {"f"} and second.token_masks == {}
    assert harness.settle()
    third = harness.launch()
    assert third is not None and set(third.num_scheduled_tokens) == {"g", "f"}


def test_a_chunk_of_a_prompt_needs_no_mask() -> None:
    harness = Harness(max_num_batched_tokens=4, depth=2)
    matcher = Matcher()
    add(harness, make_request("g", list(range(10)), max_tokens=2, eos=()), matcher)
    steps = [harness.launch(), harness.launch()]
    harness.settle()
    steps.append(harness.launch())
    assert [bool(step and step.token_masks) for step in steps] == [False, False, True]
    harness.drain()


def test_a_grammar_that_gives_up_ends_its_request_alone() -> None:
    harness = Harness(seed=3)
    add(harness, make_request("g", [1, 2], max_tokens=9, eos=()), Matcher(limit=2))
    other = make_request("f", [3, 4], max_tokens=9, eos=())
    harness.add(other)
    harness.drain()
    assert harness.finished == {"g": FinishReason.ERROR, "f": FinishReason.LENGTH}
    assert len(harness.outputs["g"]) == 2 and harness.outputs["f"] == expected_output(other)


def test_abort_with_a_token_in_flight() -> None:
    harness = Harness(depth=2)
    matcher = Matcher()
    add(harness, make_request("g", [1, 2], max_tokens=9, eos=()), matcher)
    harness.launch()
    harness.abort("g")
    harness.drain()
    assert matcher.output == [] and harness.outputs["g"] == []
