"""The one-pass draw beside the sampler's own: the same tokens."""

from __future__ import annotations

import pytest
import torch

from mmv1.kernels.sampling import gumbel_argmax
from mmv1.runner.platform import Platform
from mmv1.runner.sampler import Sampler
from tests.kernels import contract

DEVICE = Platform().device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 3), (30, 1024), (7, 2500)])
def test_it_draws_what_the_sampler_draws(rows: int, vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = contract.apart((torch.randn(rows, vocab, device=DEVICE) * 3).to(dtype))
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), device=DEVICE)
    temperature = torch.rand(rows, device=DEVICE) * 2 + 0.05
    temperature[::3] = 0.0
    noise = Sampler(Platform(), vocab)._log_exponential(keys)
    scores = logits.float()
    heat = temperature.unsqueeze(1)
    scores = torch.where(heat > 0, scores / heat.clamp(min=0.05) - noise, scores)
    with contract.poisoned_outputs():
        drawn = gumbel_argmax(logits, temperature, keys)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, scores.argmax(dim=-1))


def test_the_noise_itself_is_the_samplers() -> None:
    """Over equal logits the smallest exponential variate wins."""
    vocab = 40
    keys = torch.arange(150, device=DEVICE) * 7919 - 500_000
    noise = Sampler(Platform(), vocab)._log_exponential(keys)
    drawn = gumbel_argmax(torch.zeros(150, vocab, device=DEVICE), torch.ones(150, device=DEVICE), keys)
    assert torch.equal(drawn, noise.argmin(dim=-1))


def test_the_lowest_id_of_equals_wins() -> None:
    logits = torch.zeros(3, 3000, device=DEVICE, dtype=torch.bfloat16)
    logits[1, [1023, 1024, 2999]] = 5.0
    logits[2, [2999, 2047]] = 5.0
    zeros = torch.zeros(3, device=DEVICE)
    assert gumbel_argmax(logits, zeros, torch.zeros(3, dtype=torch.int64, device=DEVICE)).tolist() == [0, 1023, 2047]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_comes_out_whatever_goes_in(temperature: float) -> None:
    logits = torch.randn(4, 1030, device=DEVICE)
    logits[0] = float("nan")
    logits[1] = -float("inf")
    logits[2, 700] = float("nan")
    logits[3, 900] = float("inf")
    drawn = gumbel_argmax(logits, torch.full((4,), temperature, device=DEVICE), torch.arange(4, device=DEVICE)).tolist()
    assert drawn == [0, 0, 700, 900]
