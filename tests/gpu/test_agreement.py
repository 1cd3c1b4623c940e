"""Real shapes in bfloat16: mmv1 answers as transformers does on the same weights and the same device.

Two hundred conversations, all at once: tokens are equal until the reference itself is within rounding of choosing another, and
what tokens are chosen from differs by no more than two roundings (see reference.py for the bounds).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmv1.engine.llm import LLM
from mmv1.engine.output_processor import RequestOutput
from tests.gpu.conftest import MAX_TOKENS, MEMORY, NUM_CASES, Record
from tests.gpu.reference import NUM_LOGPROBS, Comparison, Reference, Steps, compare
from tests.integration.conversations import Case, text_part
from tests.integration.engines import greedy
from tests.pictures import make_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

GREEDY = greedy(MAX_TOKENS, logprobs=NUM_LOGPROBS, ignore_eos=True)
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("3B", "default settings", {}),
    ("7B, 8 layers", "default settings", {}),
    ("7B, 8 layers", "triton attention", {"attention_backend": "triton"}),
    ("7B, 8 layers", "plain torch", {"attention_backend": "sdpa", "enforce_eager": True, "fused_kernels": False}),
    ("Qwen3-VL-8B, 6 layers", "default settings", {}),
    ("Qwen3-VL-30B-A3B, 4 layers", "default settings", {}),
]


@pytest.fixture(scope="module", params=RUNS, ids=[f"{shape}, {what}" for shape, what, _ in RUNS])
def run(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    return request.param


@pytest.fixture(scope="module")
def reference(run: tuple[str, str, dict[str, Any]], references: Callable[[str], Reference]) -> Reference:
    return references(run[0])


@pytest.fixture(scope="module")
def engine(run: tuple[str, str, dict[str, Any]], reference: Reference, record: Record) -> Iterator[LLM]:
    started_at = time.perf_counter()
    with LLM(reference.model_dir, max_model_len=16384, **MEMORY, **run[2]) as started:
        ready = started.engine.ready
        assert ready is not None
        assert (ready.dtype, ready.device != "cpu") == ("bfloat16", True)
        seconds = round(time.perf_counter() - started_at, 1)
        record(name_of(run), {"attention backend": ready.attention_backend, "seconds to start": seconds})
        yield started


@pytest.fixture(scope="module")
def answers(engine: LLM, conversations: list[Case]) -> list[RequestOutput]:
    return engine.chat([case.messages for case in conversations], GREEDY)


@pytest.fixture(scope="module")
def comparison(
    run: tuple[str, str, dict[str, Any]], answers: list[RequestOutput], reference: Reference, record: Record
) -> Comparison:
    compared = compare([Steps.of(answer.outputs[0]) for answer in answers], reference.answers)
    record(name_of(run), compared.figures(reference))
    return compared


def name_of(run: tuple[str, str, dict[str, Any]]) -> str:
    return f"agreement with transformers: {run[0]}, {run[1]}"


def test_prompts_have_the_same_tokens(answers: list[RequestOutput], reference: Reference) -> None:
    assert [answer.prompt_token_ids for answer in answers] == reference.prompts
    assert len(answers) == NUM_CASES >= 200


def test_tokens_are_equal_until_a_near_tie(comparison: Comparison, reference: Reference) -> None:
    assert comparison.worst_gap < reference.near_tie
    assert comparison.num_equal > NUM_CASES // 4
    assert comparison.num_tokens > NUM_CASES * MAX_TOKENS // 2


def test_log_probabilities_are_within_rounding(comparison: Comparison, reference: Reference) -> None:
    assert comparison.worst_logprob < reference.near_tie
    assert comparison.rms_logprob < 1.75 * reference.noise


def test_first_log_probabilities_are_within_rounding(answers: list[RequestOutput], reference: Reference) -> None:
    """Each prompt's own, so that one wrong prompt does not vanish in the mean of all."""
    for index, (answer, expected) in enumerate(zip(answers, reference.answers, strict=True)):
        first, theirs = Steps.of(answer.outputs[0]), Steps(expected.token_ids[:1], expected.logprobs[:1])
        alone = compare([Steps(first.token_ids[:1], first.logprobs[:1])], [theirs])
        assert alone.rms_logprob < 4 * reference.noise, index


def test_rounding_is_small_beside_what_it_is_compared_with(reference: Reference) -> None:
    """Or the bounds would excuse anything."""
    assert 0 < reference.noise < 0.06 * reference.spread


def test_pictures_matter(engine: LLM, reference: Reference) -> None:
    """The same words about ten pictures: at least what comes first is chosen from something else, far beyond rounding."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": make_image(300, 260, seed=seed)}, text_part("What is it?")]}]
        for seed in range(10)
    ]
    answers = [Steps.of(answer.outputs[0]) for answer in engine.chat(messages, GREEDY)]
    assert len({tuple(answer.token_ids) for answer in answers}) > 7
    firsts = [Steps(answer.token_ids[:1], answer.logprobs[:1]) for answer in answers]
    for one, other in itertools.pairwise(firsts):
        assert compare([one], [other]).rms_logprob > 4 * reference.noise
