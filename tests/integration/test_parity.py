"""The engine answers as transformers does on the same weights: token for token, and with the same probabilities before the first.

Sixty conversations and more, all submitted at once, so that batches, chunks and caches have their part in it.
"""

from __future__ import annotations

import pytest
import torch

from mmv1.engine.llm import LLM
from mmv1.engine.output_processor import CompletionOutput, RequestOutput
from mmv1.types import SamplingParams
from tests.integration.conversations import SIZES, Case, make_cases
from tests.integration.engines import forget_caches, greedy
from tests.oracle import HFOracle, OracleAnswer

NUM_CASES = 65
MAX_TOKENS = 16
TOLERANCE = 1e-4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return make_cases(NUM_CASES, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def references(hf_oracle: HFOracle, cases: list[Case]) -> list[OracleAnswer]:
    return [hf_oracle(case.reference, MAX_TOKENS) for case in cases]


@pytest.fixture(scope="module")
def answers(llm: LLM, cases: list[Case]) -> list[RequestOutput]:
    """To all conversations in one call, from cold caches."""
    forget_caches(llm)
    return llm.chat([case.messages for case in cases], greedy(MAX_TOKENS, logprobs=20))


def test_the_conversations_are_varied(cases: list[Case], answers: list[RequestOutput], hf_oracle: HFOracle) -> None:
    pictures = [
        [part["image"] for turn in case.reference for part in turn["content"] if part["type"] == "image"] for case in cases
    ]
    assert {len(listed) for listed in pictures} == {0, 1, 2, 3, 4}
    assert {image.size for listed in pictures for image in listed} == set(SIZES)
    assert {len(case.messages) for case in cases} == {1, 2, 3, 4}
    image_token_id = hf_oracle.model.config.image_token_id
    firsts = {answer.prompt_token_ids.index(image_token_id) for answer in answers if image_token_id in answer.prompt_token_ids}
    assert len(firsts) > 10  # pictures at many places, not always first
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) > 60  # the model tells them apart


def test_prompts_have_the_same_tokens(
    cases: list[Case], answers: list[RequestOutput], references: list[OracleAnswer]
) -> None:
    for case, answer, reference in zip(cases, answers, references, strict=True):
        assert answer.prompt_token_ids == reference.prompt_token_ids, case.name
        assert answer.num_prompt_tokens == len(reference.prompt_token_ids), case.name


def test_greedy_tokens_are_the_same(cases: list[Case], answers: list[RequestOutput], references: list[OracleAnswer]) -> None:
    for case, answer, reference in zip(cases, answers, references, strict=True):
        assert_same_tokens(answer.outputs[0].token_ids, reference, case.name)


def assert_same_tokens(token_ids: list[int], reference: OracleAnswer, name: str) -> None:
    """The same tokens; only where the reference's two best logits are within the tolerance may it be the other of the two, and
    what follows is then another answer."""
    for step, (mine, theirs) in enumerate(zip(token_ids, reference.token_ids, strict=False)):
        if mine != theirs:
            best, second = reference.logits[step].topk(2).values.tolist()
            is_tie = best - second < TOLERANCE and mine == int(reference.logits[step].topk(2).indices[1])
            assert is_tie, f"{name}: token {step} is {mine}, not {theirs}, which is better by {best - second}"
            return
    assert len(token_ids) == len(reference.token_ids), name


def test_no_answer_hangs_on_a_near_tie(references: list[OracleAnswer]) -> None:
    """So the comparison of tokens is one of whole answers: nowhere does it excuse a difference."""
    best = torch.cat([reference.logits for reference in references]).topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1]).min() > TOLERANCE


def test_first_probabilities_are_the_same(
    cases: list[Case], answers: list[RequestOutput], references: list[OracleAnswer]
) -> None:
    for case, answer, reference in zip(cases, answers, references, strict=True):
        expected = reference.first_logits.log_softmax(-1).topk(20)
        assert_same_logprobs(answer.outputs[0], expected.indices, expected.values, case.name)


def test_first_probabilities_of_the_whole_vocabulary_are_the_same(
    llm: LLM, cases: list[Case], references: list[OracleAnswer]
) -> None:
    forget_caches(llm)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=llm.engine.config.model.vocab_size)
    for case, answer, reference in zip(cases, llm.chat([c.messages for c in cases], params), references, strict=True):
        vocabulary = torch.arange(len(reference.first_logits))
        assert_same_logprobs(answer.outputs[0], vocabulary, reference.first_logits.log_softmax(-1), case.name)


def assert_same_logprobs(output: CompletionOutput, token_ids: torch.Tensor, logprobs: torch.Tensor, name: str) -> None:
    """What the first token was chosen from has these tokens with these log-probabilities."""
    (first, *_) = output.logprobs or []
    mine = {top.token_id: top.logprob for top in first.top}
    theirs = dict(zip(token_ids.tolist(), logprobs.tolist(), strict=True))
    assert len(mine) == len(theirs), name
    least = min(mine.values())  # the last of the likeliest may be another one, if as likely
    worst = max(abs(mine.get(token_id, least) - logprob) for token_id, logprob in theirs.items())
    assert worst < TOLERANCE, f"{name}: off by {worst}"
