"""Biases, bans and masks against a reference that reads tokens from lists, in batches with requests that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmv1.runner.sampler import Sampler
from mmv1.runner.sampling_columns import SamplingColumns
from mmv1.types import SamplingParams, StructuredOutputs
from tests.runner.test_sampler import PLATFORM, VOCAB

EOS = (7,)
Case = tuple[SamplingParams, list[int], list[int], "bytes | None"]  # parameters, prompt, output, mask


def as_mask(allowed: set[int]) -> bytes:
    """As llguidance makes them: whole words of 32 bits, and one more."""
    mask = bytearray(-(-VOCAB // 32) * 4 + 4)
    for token in allowed:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def allowed_tokens(case: Case) -> list[int]:
    """What may come next, from what does least harm: the mask goes before the bans."""
    params, _, output, mask = case
    tokens = set(range(VOCAB))
    if mask is not None:
        tokens &= {i for i in tokens if mask[i // 8] >> i % 8 & 1}
    if params.allowed_token_ids is not None:
        tokens &= set(params.allowed_token_ids)
    banned = set(EOS) | set(params.stop_token_ids) if len(output) < params.min_tokens else set()
    for word in params.bad_words_token_ids:
        begin = list(word[:-1])
        if len(output) >= len(begin) and output[len(output) - len(begin) :] == begin:
            banned.add(word[-1])
    return sorted(tokens - banned or tokens)


def naive(logits: torch.Tensor, case: Case) -> torch.Tensor:
    scores = logits.double().clone()
    for token, bias in case[0].logit_bias.items():
        scores[token] += bias
    result = torch.full_like(scores, -torch.inf)
    allowed = allowed_tokens(case)
    result[allowed] = scores[allowed]
    if case[0].temperature == 0:
        return torch.nn.functional.one_hot(result.argmax(), VOCAB).double()
    return (result / case[0].temperature).softmax(-1)


GRAMMAR = StructuredOutputs(regex="x")
CASES: list[Case] = [
    (SamplingParams(), [1, 2], [], None),
    (SamplingParams(temperature=0.0), [1, 2], [], None),
    (SamplingParams(logit_bias={3: 4.0, 9: -100.0, 12: 2.5}), [1], [3], None),
    (SamplingParams(temperature=0.0, logit_bias={44: 100.0}), [1], [], None),
    (SamplingParams(min_tokens=3, stop_token_ids=(4, 5)), [1], [2, 6], None),
    (SamplingParams(min_tokens=2, stop_token_ids=(4, 5), logit_bias={7: 100.0}), [1], [], None),
    (SamplingParams(min_tokens=2, stop_token_ids=(4, 5)), [1], [2, 6], None),  # enough of them
    (SamplingParams(temperature=0.0, min_tokens=1, logit_bias={7: 100.0}), [1], [], None),
    (SamplingParams(bad_words_token_ids=((8,), (1, 2), (3, 4, 5), (3, 4, 6), (9, 9, 9, 9))), [3], [3, 4], None),
    (SamplingParams(bad_words_token_ids=((3, 4, 5), (4, 6))), [3], [4], None),  # the prompt's 3 begins no word
    (SamplingParams(temperature=0.0, bad_words_token_ids=((2, 11),), logit_bias={11: 100.0}), [1], [2], None),
    (SamplingParams(temperature=0.7, allowed_token_ids=(0, 3, 30, 49)), [1], [2], None),
    (SamplingParams(temperature=0.0, allowed_token_ids=(13,)), [1], [2], None),
    (SamplingParams(structured_outputs=GRAMMAR), [1], [2], as_mask({1, 8, 31, 32, 47})),
    (SamplingParams(temperature=0.0, structured_outputs=GRAMMAR), [1], [2], as_mask({49})),
    (SamplingParams(min_tokens=9, structured_outputs=GRAMMAR), [1], [2], as_mask(set(EOS))),  # the mask goes before
    (SamplingParams(min_tokens=9, bad_words_token_ids=((5,),), structured_outputs=GRAMMAR), [1], [2], as_mask({*EOS, 5, 6})),
]  # fmt: skip


def sample(cases: list[Case], logits: torch.Tensor, seed: int) -> tuple[list[int], object]:
    columns = SamplingColumns(len(cases))
    token_ids = torch.randint(0, VOCAB, (len(cases), 16), dtype=torch.int32)
    for row, (params, prompt, output, _) in enumerate(cases):
        columns.set(row, params, len(prompt), seed * 1000 + row, EOS)
        token_ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.int32)
    lengths = np.array([len(prompt) + len(output) for _, prompt, output, _ in cases])
    batch = columns.select(np.arange(len(cases)), lengths, [case[3] for case in cases])
    result = Sampler(PLATFORM, VOCAB)(logits.to(PLATFORM.device), batch, token_ids.to(PLATFORM.device))
    return result.token_ids.tolist(), result.logprobs


def test_every_rule_gives_its_distribution_in_one_mixed_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn(len(CASES), VOCAB) * 2
    each, rounds = 100, 20
    counts = torch.zeros(len(CASES), VOCAB, dtype=torch.double)
    for number in range(rounds):
        tokens = torch.tensor(sample(CASES * each, logits.repeat(each, 1), number)[0]).view(each, len(CASES))
        counts += torch.nn.functional.one_hot(tokens, VOCAB).sum(0)
    for i, case in enumerate(CASES):
        expected = naive(logits[i], case)
        assert counts[i][expected == 0].sum() == 0, case
        distance = (counts[i] / (each * rounds) - expected).abs().sum() / 2
        assert distance < 0.02 * (expected > 0).sum() ** 0.5 / 1.4 + 0.002, (case, distance)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_request_draws_the_same_alone(index: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(len(CASES), VOCAB)
    together = sample(CASES, logits, 5)[0][index]
    columns_of_one = [(SamplingParams(), [1], [], None)] * index + [CASES[index]]
    assert sample(columns_of_one, logits[: index + 1], 5)[0][index] == together


def test_rules_leave_logits_and_logprobs_as_the_model_gave_them() -> None:
    torch.manual_seed(3)
    params = SamplingParams(temperature=0.0, logprobs=2, logit_bias={9: 50.0}, structured_outputs=GRAMMAR)
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    cases: list[Case] = [(params, [1], [], as_mask({4, 9})), (SamplingParams(logprobs=1), [1], [], None)]
    tokens, logprobs = sample(cases, logits, 0)
    assert tokens[0] == 9 and torch.equal(logits, before)
    expected = logits.log_softmax(-1)
    assert logprobs.sampled_logprob[0].item() == pytest.approx(expected[0, 9].item(), abs=1e-5)  # type: ignore[attr-defined]
    assert logprobs.top_ids[0].tolist() == expected[0].topk(2).indices.tolist()  # type: ignore[attr-defined]


def test_penalties_come_after_biases() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias={3: 5.0, 4: 4.0})
    tokens, _ = sample([(params, [1], [3], None)], torch.zeros(1, VOCAB), 0)
    assert tokens == [4]


def test_requests_with_rules_are_not_served_by_the_kernel_that_knows_none() -> None:
    columns = SamplingColumns(len(CASES))
    for row, (params, prompt, _, _) in enumerate(CASES):
        columns.set(row, params, len(prompt), 0, EOS)
    batch = columns.select(np.arange(len(CASES)), np.ones(len(CASES), dtype=np.int64))
    assert batch.is_simple.tolist() == [True, True] + [False] * (len(CASES) - 2)
