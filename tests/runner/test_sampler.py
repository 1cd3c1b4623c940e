"""The sampler against a naive row-by-row reference, its distribution, and its independence of whom it is batched with."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from mmv1.kernels.sampling import gumbel_argmax
from mmv1.runner.platform import Platform
from mmv1.runner.sampler import Sampler
from mmv1.runner.sampling_columns import SamplingBatch, SamplingColumns
from mmv1.types import SamplingParams

VOCAB = 50
PLATFORM = Platform()


def make_batch(
    params: list[SamplingParams], prompts: list[list[int]], outputs: list[list[int]]
) -> tuple[SamplingBatch, torch.Tensor]:
    """The batch, and the device's token ids with rubbish past each row's end."""
    columns = SamplingColumns(len(params))
    token_ids = torch.randint(0, VOCAB, (len(params), 64), dtype=torch.int32, device=PLATFORM.device)
    for row, (p, prompt, output) in enumerate(zip(params, prompts, outputs, strict=True)):
        columns.set(row, p, len(prompt), (p.seed or 0) % (1 << 64))
        token_ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.int32)
    lengths = np.array([len(a) + len(b) for a, b in zip(prompts, outputs, strict=True)])
    return columns.select(np.arange(len(params)), lengths), token_ids


def run(logits: torch.Tensor, params: list[SamplingParams], prompts: list[list[int]] | None = None,
        outputs: list[list[int]] | None = None) -> list[int]:
    prompts = prompts or [[1]] * len(params)
    outputs = outputs or [[]] * len(params)
    batch, token_ids = make_batch(params, prompts, outputs)
    return Sampler(PLATFORM, logits.shape[1])(logits.to(PLATFORM.device), batch, token_ids).token_ids.tolist()


def naive_distribution(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Probabilities of one row's next token, written as the parameters are documented."""
    scores = logits.double().clone()
    for token in set(prompt + output):
        scores[token] *= 1 / params.repetition_penalty if scores[token] > 0 else params.repetition_penalty
    for token, count in Counter(output).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    if params.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(), len(scores)).double()
    p = (scores / params.temperature).softmax(-1)
    p[p < params.min_p * p.max()] = 0
    order = p.argsort(descending=True).tolist()
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1:
        before = 0.0
        for token in order:
            mass = p[token].item()
            if before >= params.top_p:
                p[token] = 0
            before += mass
    return p / p.sum()


CASES = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.7, top_k=5),
    SamplingParams(top_k=1000),
    SamplingParams(top_k=-1, top_p=0.6),
    SamplingParams(top_p=0.01),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.3, top_k=12, top_p=0.8, min_p=0.05),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(repetition_penalty=0.6, temperature=0.8),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.9, presence_penalty=0.4),
    SamplingParams(temperature=0.9, frequency_penalty=0.8, repetition_penalty=1.3, top_k=20, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.5),
]


def test_every_parameter_gives_its_distribution_in_one_mixed_batch() -> None:
    """4,000 draws of every case, all cases side by side in each batch; total variation against the naive distribution."""
    torch.manual_seed(0)
    draws, per_batch = 4000, 100
    logits = torch.randn(len(CASES), VOCAB) * 2
    prompts = [torch.randint(0, VOCAB, (6,)).tolist() for _ in CASES]
    outputs = [torch.randint(0, VOCAB, (1 + i % 5 * 3,)).tolist() for i in range(len(CASES))]
    counts = torch.zeros(len(CASES), VOCAB, dtype=torch.double)
    for start in range(0, draws, per_batch):
        seeds = [start + i for i in range(per_batch)]
        params = [SamplingParams(**{f: getattr(c, f) for f in c.__struct_fields__} | {"seed": s}) for s in seeds for c in CASES]
        tokens = torch.tensor(run(logits.repeat(per_batch, 1), params, prompts * per_batch, outputs * per_batch))
        counts += torch.nn.functional.one_hot(tokens.view(per_batch, len(CASES)), VOCAB).sum(0)
    for i, case in enumerate(CASES):
        expected = naive_distribution(logits[i], case, prompts[i], outputs[i])
        assert counts[i][expected == 0].sum() == 0, case
        distance = (counts[i] / draws - expected).abs().sum() / 2
        assert distance < 0.02 * (expected > 0).sum() ** 0.5 / 2 + 0.002, (case, distance)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_output_penalties_begin_at_the_first_token_of_the_output(penalty: str) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 6, 7]] = torch.tensor([9.0, 8.0, 7.0])
    params = SamplingParams(temperature=0.0, **{penalty: 2.5})
    assert run(logits, [params], prompts=[[7, 5]], outputs=[[]]) == [5]
    assert run(logits, [params], prompts=[[7, 6]], outputs=[[5]]) == [6]
    assert run(logits, [params], prompts=[[5, 6]], outputs=[[5, 7, 6]]) == [5]  # by 6.5 to 5.5 to 4.5
    assert run(logits, [params], prompts=[[1]], outputs=[[5, 6, 5]]) == [7]


def test_successive_draws_of_one_request_are_independent() -> None:
    """One seed, many positions: pairs of neighbours occur as often as the product of their probabilities says."""
    n = 20_000
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    params = [SamplingParams(seed=7)] * 500
    tokens: list[int] = []
    columns = SamplingColumns(500)
    for row in range(500):
        columns.set(row, params[row], 1, 7)
    sampler = Sampler(PLATFORM, 3)
    logits = probabilities.log().expand(500, 3).to(PLATFORM.device)
    no_tokens = torch.zeros(500, 1, dtype=torch.int32, device=PLATFORM.device)
    for start in range(0, n, 500):
        batch = columns.select(np.arange(500), 1 + np.arange(start, start + 500))
        tokens += sampler(logits, batch, no_tokens).token_ids.tolist()
    pairs = Counter(itertools.pairwise(tokens))
    for a in range(3):
        for b in range(3):
            assert abs(pairs[a, b] / n - probabilities[a] * probabilities[b]) < 0.012


def test_noise_is_exponential_to_its_tails() -> None:
    sampler = Sampler(PLATFORM, 1000)
    log_e = sampler._log_exponential(torch.arange(1000, device=PLATFORM.device) * 7919).cpu()
    assert log_e.isfinite().all()
    values = log_e.double().exp().flatten().sort().values
    uniform = 1 - (-values).exp()
    expected = (torch.arange(len(values), dtype=torch.double) + 0.5) / len(values)
    assert (uniform - expected).abs().max() < 0.002  # Kolmogorov-Smirnov at a million samples
    assert values[0] < 1e-5
    assert values[-1] > 10


def test_a_seed_repeats_whatever_the_batch_and_another_differs() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, VOCAB)
    strangers = [SamplingParams(seed=100 + i, top_p=0.5 + i / 20, temperature=float(i % 3)) for i in range(7)]
    mine = SamplingParams(seed=-5, top_k=30)
    alone = run(logits[3:4], [mine])
    assert run(logits, [*strangers[:3], mine, *strangers[3:]])[3] == alone[0]
    many = [run(logits[3:4], [SamplingParams(seed=s)])[0] for s in range(40)]
    assert len(set(many)) > 5
    positions = [run(logits[3:4], [mine], outputs=[[1] * n])[0] for n in range(40)]
    assert len(set(positions)) > 5


def test_equal_seeds_of_any_64_bits_are_accepted() -> None:
    logits = torch.randn(4, VOCAB)
    seeds = [0, -1, (1 << 63) - 1, -(1 << 63)]
    first = run(logits, [SamplingParams(seed=s) for s in seeds])
    assert first == run(logits, [SamplingParams(seed=s) for s in seeds])


def test_large_vocabularies_are_drawn_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, VOCAB)
    params = [SamplingParams(seed=i) for i in range(9)]
    whole = run(logits, params)
    monkeypatch.setattr("mmv1.runner.sampler._MAX_NOISE_NUMBERS", 2 * VOCAB)
    assert run(logits, params) == whole


def test_logits_are_left_as_they_were() -> None:
    """Log-probabilities are of the raw logits, whichever row asks and whatever else it asks for."""
    logits = torch.randn(3, VOCAB, device=PLATFORM.device)
    before = logits.clone()
    params = [SamplingParams(seed=1, repetition_penalty=2.0, top_k=3, min_p=0.1, logprobs=2), SamplingParams(temperature=0.0),
              SamplingParams(temperature=0.0, presence_penalty=1.0, logprobs=5)]
    batch, token_ids = make_batch(params, [[1, 2]] * 3, [[3]] * 3)
    output = Sampler(PLATFORM, VOCAB)(logits, batch, token_ids)
    assert torch.equal(logits, before)
    assert output.logprobs is not None
    assert output.logprobs.requests.tolist() == [0, 2]
    expected = before.log_softmax(-1)[[0, 2]]
    torch.testing.assert_close(output.logprobs.top_logprobs, expected.topk(5).values)
    chosen = expected.gather(1, output.token_ids[[0, 2], None])
    torch.testing.assert_close(output.logprobs.sampled_logprob, chosen[:, 0])
    assert output.logprobs.sampled_rank.tolist() == ((expected > chosen).sum(1) + 1).tolist()


MIXED = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=5, logprobs=3),
    SamplingParams(seed=3, temperature=0.4),
    SamplingParams(temperature=0.0),
    SamplingParams(seed=4, repetition_penalty=1.4),
    SamplingParams(temperature=0.0, top_p=0.3, min_p=0.5),
    SamplingParams(temperature=0.0, logprobs=1),
    SamplingParams(seed=5, min_p=0.1),
    SamplingParams(seed=6, top_p=0.7),
    SamplingParams(seed=7, temperature=0.0, presence_penalty=0.5),
]


@pytest.fixture
def fused_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fused draw is used, whatever the device; the numbers of rows it was called with."""
    rows = []

    def spy(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        rows.append(logits.shape[0])
        return gumbel_argmax(logits, temperature, keys)

    monkeypatch.setattr("mmv1.runner.sampler.uses_fused", lambda device: True)
    monkeypatch.setattr("mmv1.kernels.sampling.gumbel_argmax", spy)
    return rows


@pytest.mark.parametrize(("which", "fused"), [
    (range(10), [4]), ([0, 2, 3, 5], [4]), ([1, 4, 6, 7, 8, 9], []), ([3], [1]), ([1], []), ([6, 5, 4, 3, 2, 1, 0], [4]),
])  # fmt: skip
def test_fused_and_torch_rows_of_one_batch_get_the_tokens_they_get_by_torch_alone(
    which: list[int], fused: list[int], fused_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that ask for a temperature at most are drawn by one kernel, others by torch; tokens and log-probabilities are those
    of the batch that goes through torch whole."""
    torch.manual_seed(3)
    logits = (torch.randn(len(which), VOCAB) * 2).bfloat16().to(PLATFORM.device)
    params = [MIXED[index] for index in which]
    batch, token_ids = make_batch(params, [[1, 2]] * len(which), [[3] * index for index in which])
    mixed = Sampler(PLATFORM, VOCAB)(logits, batch, token_ids)
    assert fused_rows == fused
    monkeypatch.setattr("mmv1.runner.sampler.uses_fused", lambda device: False)
    by_torch = Sampler(PLATFORM, VOCAB)(logits, batch, token_ids)
    assert fused_rows == fused
    assert mixed.token_ids.dtype == torch.int64 and torch.equal(mixed.token_ids, by_torch.token_ids)
    if by_torch.logprobs is None:
        assert mixed.logprobs is None
    else:
        assert mixed.logprobs is not None
        assert mixed.logprobs.requests.tolist() == by_torch.logprobs.requests.tolist()
        assert all(torch.equal(a, b) for a, b in zip(mixed.logprobs.tensors, by_torch.logprobs.tensors, strict=True))
