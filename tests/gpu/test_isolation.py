"""What a request is answered does not depend on who is with it, nor on what lies in memory that is not its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmv1.engine.llm import LLM
from mmv1.runner import worker as worker_module
from mmv1.types import SamplingParams
from tests.gpu.conftest import MAX_TOKENS, MEMORY, Record
from tests.gpu.reference import NUM_LOGPROBS, Reference, Steps, compare
from tests.integration.conversations import Case, make_cases
from tests.integration.engines import assert_same_answer, forget_caches, greedy
from tests.oracle import HFOracle
from tests.runner.driver import Driver, make_picture, make_prompt, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_STRANGERS = 31
NUM_ASKED = 8
SHAPE = "7B, 8 layers"


def among_strangers(llm: LLM, cases: Sequence[Case], params: SamplingParams) -> tuple[list[Any], list[Any]]:
    """The answers to the first conversations, each alone and each among thirty-one others, who sample; caches cold each time."""
    strangers = [case.messages for case in cases[NUM_ASKED : NUM_ASKED + NUM_STRANGERS]]
    sampled = [SamplingParams(temperature=1.0, seed=index, max_tokens=24, ignore_eos=True) for index in range(NUM_STRANGERS)]
    alone, together = [], []
    for case in cases[:NUM_ASKED]:
        forget_caches(llm)
        alone.append(llm.chat(case.messages, params)[0].outputs[0])
        forget_caches(llm)
        everybody = llm.chat([*strangers[:16], case.messages, *strangers[16:]], [*sampled[:16], params, *sampled[16:]])
        together.append(everybody[16].outputs[0])
    return alone, together


def test_the_same_in_float32(llm: LLM, tmp_path: Path) -> None:
    """The tiny model, whose answers no rounding changes: token for token."""
    cases = make_cases(NUM_ASKED + NUM_STRANGERS, tmp_path)
    alone, together = among_strangers(llm, cases, greedy(24, logprobs=5))
    for one, other, case in zip(alone, together, cases, strict=False):
        assert_same_answer(other, one, case.name)


def test_the_same_until_a_near_tie_in_bfloat16(
    references: Callable[[str], Reference], conversations: list[Case], record: Record
) -> None:
    reference = references(SHAPE)
    params = greedy(MAX_TOKENS, logprobs=NUM_LOGPROBS, ignore_eos=True)
    with LLM(reference.model_dir, max_model_len=16384, **MEMORY) as llm:
        alone, together = among_strangers(llm, conversations, params)
    compared = compare([Steps.of(each) for each in together], [Steps.of(each) for each in alone])
    record(f"alone and among {NUM_STRANGERS} strangers: {SHAPE}", compared.figures(reference))
    assert compared.worst_gap < reference.near_tie
    assert compared.rms_logprob < 1.75 * reference.noise
    assert compared.num_equal >= NUM_ASKED // 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, {"attention_backend": "triton"}], ids=str)
def test_unused_memory_may_hold_anything(
    tiny_model_dir: Path, hf_oracle: HFOracle, monkeypatch: pytest.MonkeyPatch, dtype: str, settings: dict[str, Any]
) -> None:
    """With NaN in every block and every row that nobody has written, the null block included."""
    expected = answers_of_steps(tiny_model_dir, hf_oracle, dtype, settings)
    allocate, make_slab = worker_module.allocate_kv_caches, worker_module.EncoderCacheTensors
    poisoned: list[torch.Tensor] = []

    def with_nan(*args: Any) -> Any:
        made = allocate(*args)
        poisoned.extend(cache.fill_(math.nan) for cache in made)
        return made

    def slab_with_nan(*args: Any) -> Any:
        made = make_slab(*args)
        poisoned.append(made.slab.fill_(math.nan))
        return made

    monkeypatch.setattr(worker_module, "allocate_kv_caches", with_nan)
    monkeypatch.setattr(worker_module, "EncoderCacheTensors", slab_with_nan)
    assert answers_of_steps(tiny_model_dir, hf_oracle, dtype, settings) == expected
    assert len(poisoned) > 1
    assert all(cache.isnan().any() for cache in poisoned)  # it was there all the time


def answers_of_steps(
    model_dir: Path, oracle: HFOracle, dtype: str, settings: dict[str, Any]
) -> list[tuple[list[int], list[list[float]]]]:
    """Tokens and log-probabilities of six requests, in chunks: prompts that fill blocks and that do not, decodes of one and of
    several, mixed steps."""
    driver = Driver(tiny_config(model_dir, dtype=dtype, **settings))
    image_token_id = oracle.model.config.image_token_id
    layouts: list[list[Any]] = [
        [5, make_picture(5, 3), 7], [1], [130], [16], [40, make_picture(6, 2), 1, make_picture(3, 3), 5], [make_picture(1, 6), 3],
    ]  # fmt: skip
    for index, layout in enumerate(layouts):
        prompt = make_prompt(layout, image_token_id=image_token_id, seed=index)
        driver.add(str(index), prompt, SamplingParams(temperature=0.0, logprobs=3))
    driver.run(12, chunk=33)
    answers = []
    for index in range(len(layouts)):
        tokens, request = driver.output_of(str(index)), driver.finish(str(index))
        answers.append((tokens, [step.logprobs for step in request.logprobs]))
    driver.close()
    assert all(math.isfinite(value) for _, steps in answers for step in steps for value in step)
    return answers
