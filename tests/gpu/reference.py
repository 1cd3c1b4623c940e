"""transformers' answers in bfloat16 on the device, how much its own rounding moves its logits, and how answers are compared.

Two right computations in bfloat16 differ by rounding. How much rounding does is measured, not guessed: the reference's first
logits against those of the same weights in float32. Their rms difference is `noise`, the largest `worst_noise`. What separates
the two best tokens differs between two right computations with a standard deviation of at most 2 noise (four roundings), so
NEAR_TIE times noise, five of those, is where a difference in tokens stops being rounding. In a mixture of experts rounding may
choose another expert, which few tokens meet and which moves those far more: there it is twice the worst. Log-probabilities of one
token differ with sqrt(2) noise.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmv1.engine.output_processor import CompletionOutput
from tests.gpu import random_models
from tests.integration.conversations import Case
from tests.oracle import HFOracle

NEAR_TIE = 10.0
NUM_LOGPROBS = 20
KEPT_LOGPROBS = 100  # of the reference: what mmv1 calls likely is among them
NUM_EXACT = 20  # conversations computed in float32 too


@dataclass(frozen=True)
class Steps:
    """An answer: its tokens, and what each was chosen from: the likeliest tokens' log-probabilities."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]

    @classmethod
    def of(cls, output: CompletionOutput) -> Steps:
        return cls(output.token_ids, [{top.token_id: top.logprob for top in step.top} for step in output.logprobs or ()])


@dataclass(frozen=True)
class Reference:
    model_dir: Path
    prompts: list[list[int]]
    answers: list[Steps]
    noise: float  # rms of what rounding does to a logit
    worst_noise: float
    spread: float  # the standard deviation of logits

    @property
    def near_tie(self) -> float:
        return max(NEAR_TIE * self.noise, 2 * self.worst_noise)


def ask_reference(model_dir: Path, cases: Sequence[Case], max_tokens: int) -> Reference:
    oracle = HFOracle(model_dir, torch.bfloat16, random_models.DEVICE)
    prompts, answers, first_logits = [], [], []
    every = max(1, len(cases) // NUM_EXACT)
    for index, case in enumerate(cases):
        answer = oracle(case.reference, max_tokens, ignore_eos=True)
        likeliest = answer.logits.log_softmax(-1).topk(KEPT_LOGPROBS)
        kept = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        prompts.append(answer.prompt_token_ids)
        answers.append(Steps(answer.token_ids, [dict(zip(*step, strict=True)) for step in kept]))
        if index % every == index // every % 5:  # with 0 to 4 pictures in turn
            first_logits.append((case, answer.first_logits))
    exact, rounded = _in_float32(oracle, [case for case, _ in first_logits]), torch.stack([each for _, each in first_logits])
    del oracle
    gc.collect()
    torch.cuda.empty_cache()
    error = rounded - exact
    noise, worst_noise = float(error.square().mean().sqrt()), float(error.abs().max())
    return Reference(model_dir, prompts, answers, noise, worst_noise, float(exact.std()))


def _in_float32(oracle: HFOracle, cases: Sequence[Case]) -> torch.Tensor:
    """First logits [cases, vocab_size] of the same weights."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    oracle.model.float()
    logits = torch.stack([oracle(case.reference, 1, ignore_eos=True).first_logits for case in cases])
    torch.backends.cudnn.allow_tf32 = tf32
    return logits


@dataclass
class Comparison:
    """Of all answers to all prompts."""

    num_prompts: int = 0
    num_equal: int = 0  # answers equal to their end
    num_tokens: int = 0  # compared
    worst_gap: float = 0.0  # by how much the reference preferred its own token where it is the first that differs
    worst_logprob: float = 0.0
    sum_of_squares: float = 0.0
    num_logprobs: int = 0

    def add(self, got: Steps, expected: Steps) -> None:
        """Compare up to the first different token; what follows it is another answer."""
        self.num_prompts += 1
        self.num_equal += got.token_ids == expected.token_ids
        for step, (mine, theirs) in enumerate(zip(got.token_ids, expected.token_ids, strict=True)):
            self.num_tokens += 1
            self._add_logprobs(got.logprobs[step], expected.logprobs[step])
            if mine != theirs:
                gap = expected.logprobs[step][theirs] - expected.logprobs[step].get(mine, -math.inf)
                self.worst_gap = max(self.worst_gap, gap)
                return

    def _add_logprobs(self, mine: dict[int, float], theirs: dict[int, float]) -> None:
        least = min(theirs.values())
        for token_id, logprob in mine.items():
            difference = abs(logprob - theirs.get(token_id, least))
            self.worst_logprob = max(self.worst_logprob, difference)
            self.sum_of_squares += difference**2
            self.num_logprobs += 1

    @property
    def rms_logprob(self) -> float:
        return math.sqrt(self.sum_of_squares / self.num_logprobs)

    def figures(self, reference: Reference) -> dict[str, Any]:
        return {
            "prompts": self.num_prompts,
            "answers equal to their end": self.num_equal,
            "answers that part at a near-tie": self.num_prompts - self.num_equal,
            "tokens compared": self.num_tokens,
            "worst gap where answers part": round(self.worst_gap, 4),
            "near-tie bound": round(reference.near_tie, 4),
            "worst difference of a log-probability": round(self.worst_logprob, 4),
            "rms difference of log-probabilities": round(self.rms_logprob, 4),
            "noise: rms difference of the reference's logits to float32's": round(reference.noise, 4),
            "largest difference of those": round(reference.worst_noise, 4),
            "standard deviation of the logits": round(reference.spread, 4),
        }


def compare(got: Sequence[Steps], expected: Sequence[Steps]) -> Comparison:
    comparison = Comparison()
    for mine, theirs in zip(got, expected, strict=True):
        comparison.add(mine, theirs)
    return comparison
