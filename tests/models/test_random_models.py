"""The random models of tests/gpu, as far as they can be looked at without a GPU: their shapes, and small ones of each kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from examples.tiny_model import SPECIAL_TOKENS
from tests.gpu import random_models
from tests.gpu.random_models import SHAPES, Shape
from tests.gpu.reference import NUM_LOGPROBS, Steps, ask_reference, compare
from tests.integration.conversations import make_cases
from tests.integration.engines import greedy, start_here

TOKEN_IDS = {token: 512 + place for place, token in enumerate(SPECIAL_TOKENS)}
# Layers and billions of parameters, as published.
PUBLISHED = {
    "3B": (36, 3.75),
    "7B, 8 layers": (28, 8.29),
    "Qwen3-VL-8B, 6 layers": (36, 8.77),
    "Qwen3-VL-30B-A3B, 4 layers": (48, 31.07),
}
SMALL_TOWER = {"vision_layers": 4, "vision_hidden_size": 64, "vision_intermediate_size": 96, "vision_heads": 2}
SMALL = {
    "qwen2_5_vl": Shape(4, 256, 128, 2, 1, 576, True, **SMALL_TOWER),
    "qwen3_vl": Shape(4, 128, 256, 4, 2, 576, False, **SMALL_TOWER, family="qwen3_vl"),
    "qwen3_vl_moe": Shape(
        4, 256, 256, 4, 2, 576, False, **SMALL_TOWER, family="qwen3_vl_moe", num_experts=64, expert_size=64
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_at_full_depth_they_are_as_large_as_the_published_ones(name: str) -> None:
    num_layers, billions = PUBLISHED[name]
    with torch.device("meta"):
        config = random_models.config_of(replace(SHAPES[name], num_layers=num_layers), TOKEN_IDS)
        model = AutoModelForImageTextToText.from_config(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_small_one_is_made_and_agrees(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bounds of tests/gpu/test_agreement.py."""
    monkeypatch.setattr(random_models, "DEVICE", torch.device("cpu"))
    cases = make_cases(10, tmp_path)
    reference = ask_reference(random_models.find_or_make(SMALL[family], tmp_path), cases, 4)
    (engine,) = start_here(reference.model_dir, [{"dtype": "bfloat16", "max_model_len": 16384}])
    with engine:
        answers = engine.chat([case.messages for case in cases], greedy(4, logprobs=NUM_LOGPROBS, ignore_eos=True))
    assert [answer.prompt_token_ids for answer in answers] == reference.prompts
    assert 0 < reference.noise < 0.06 * reference.spread
    compared = compare([Steps.of(answer.outputs[0]) for answer in answers], reference.answers)
    assert compared.worst_gap < reference.near_tie
    assert compared.rms_logprob < 1.75 * reference.noise
