"""The engine answers as transformers does on the same weights: token for token, and with the same probabilities before the first.

Sixty conversations and more, all submitted at once, so that batches, chunks and caches have their part in it.
"""

from __future__ import annotations

import pytest
import torch

from mmv1.engine.llm import LLM
from mmv1.engine.output_processor import RequestOutput
from mmv1.types import SamplingParams
from tests.integration.conversations import SIZES, Case, make_cases, pictures_of
from tests.integration.engines import TOLERANCE, assert_same_logprobs, assert_same_tokens, forget_caches, greedy
from tests.oracle import HFOracle, OracleAnswer

NUM_CASES = 65
MAX_TOKENS = 16

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
    pictures = [pictures_of(case) for case in cases]
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
