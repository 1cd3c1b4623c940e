"""Positions against transformers', in every family that sees; both dialects of Qwen2.5-VL's config.json."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from examples.tiny_model import VISION_FAMILIES
from mmv1.config import image_normalization, text_config
from mmv1.errors import ConfigError
from mmv1.models.interface import ImageSpan
from mmv1.models.language_model import LanguageModel
from mmv1.models.qwen2 import decoder_with_mrope
from mmv1.models.qwen2_5_vl import VisionTower
from mmv1.models.registry import build_model, load_model
from mmv1.preprocess.layout import load_layout
from tests.oracle import HFOracle
from tests.runner.driver import Picture, make_picture, make_prompt, patch_of, tiny_config

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
NORMALIZATION = image_normalization({})
LAYOUTS: list[list[int | tuple[int, int]]] = [
    [7], [(3, 5)], [(5, 3)], [4, (1, 1)], [(1, 1), 4], [2, (4, 9), 3], [2, (9, 4), 3],
    [1, (2, 2), 1, (2, 2), 1, (7, 1), 1], [(1, 12), 1, (12, 1)], [100, (6, 6), 50, (3, 8), 1],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_positions_equal_transformers(
    tiny_models: Callable[[str], LanguageModel],
    hf_oracles: Callable[[str], HFOracle],
    family: str,
    layout: list[int | tuple[int, int]],
) -> None:
    oracle, patch = hf_oracles(family), patch_of(family)
    image_token_id = oracle.model.config.image_token_id
    parts: list[int | Picture] = [part if isinstance(part, int) else make_picture(*part, patch=patch) for part in layout]
    prompt = make_prompt(parts, image_token_id=image_token_id)
    images = [ImageSpan(feature.offset, feature.grid_thw) for feature in prompt.features]
    positions = tiny_models(family).prompt_positions(len(prompt.token_ids), images)
    ids = torch.tensor([prompt.token_ids])
    grids = torch.tensor([p.grid_thw for p in prompt.pictures]) if prompt.pictures else None
    expected, delta = oracle.model.model.get_rope_index(ids, (ids == image_token_id).int(), image_grid_thw=grids)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert positions.max() + 1 - len(prompt.token_ids) == delta.item()


def as_flat(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config.json (transformers 5) written as the checkpoints of transformers 4 have it."""
    nested = copy.deepcopy(config)
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    nested["vision_config"].pop("rope_parameters", None)
    nested["vision_config"]["in_chans"] = nested["vision_config"].pop("in_channels")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {**text, **nested, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def decoder(config: dict[str, Any]) -> tuple[object, list[float], list[int]]:
    """All that is read of the language model."""
    read, rotary = decoder_with_mrope(text_config(config))
    return read, rotary.inv_freq.tolist(), rotary.axes.tolist()


def test_both_dialects_of_config_mean_the_same(tiny_model_dir: Path) -> None:
    nested = json.loads((tiny_model_dir / "config.json").read_text())
    flat = as_flat(nested)
    assert "text_config" not in flat
    assert decoder(flat) == decoder(nested)
    towers = [VisionTower.from_hf(config["vision_config"], NORMALIZATION) for config in (flat, nested)]
    assert towers[0].config == towers[1].config
    saved_by_5 = copy.deepcopy(flat) | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    assert decoder(saved_by_5) == decoder(nested)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_attention_heads": None}, None),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rope_parameters": {"mrope_section": "2,3,3"}}, "mrope_section"),
        ({"rope_parameters": ["default"]}, "rope_parameters"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 1 << 50}, "num_hidden_layers"),
        ({"hidden_size": 32, "head_dim": 16}, "out_hidden_size"),
    ],
)
def test_a_config_that_is_not_supported_is_refused(tiny_model_dir: Path, change: dict[str, Any], message: str | None) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    if message is None:
        del config["text_config"]["num_attention_heads"]
        message = "does not say num_attention_heads"
    else:
        config["text_config"] |= change
    with pytest.raises(ConfigError, match=message):
        build_model(ARCHITECTURE, config, tiny_model_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": None}, {"depth": "2"}, {"num_heads": 0}, {"num_heads": 7}, {"patch_size": [14, 14]}, {"window_size": 3},
        {"fullatt_block_indexes": 1}, {"fullatt_block_indexes": ["a"]}, {"rope_parameters": {"rope_theta": "x"}},
    ],
)  # fmt: skip
def test_a_vision_config_that_cannot_be_is_refused(tiny_model_dir: Path, change: dict[str, Any]) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config["vision_config"] |= change
    (name,) = change
    with pytest.raises(ConfigError, match={"rope_parameters": "rope_theta", "num_heads": "head"}.get(name, name)):
        build_model(ARCHITECTURE, config, tiny_model_dir)
    for wrong in (None, 3):
        with pytest.raises(ConfigError):
            build_model(ARCHITECTURE, {**config, "vision_config": wrong}, tiny_model_dir)


def test_the_tower_scales_pixels_as_the_layout_says(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Of two files that contradict each other, both read the same one, which is the one that transformers reads."""
    config = json.loads((tiny_model_dir / "config.json").read_text())
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    older = json.loads((tiny_model_dir / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older | {"image_mean": [0.1] * 3}))
    newer = {"processor_class": "LanguageModelProcessor", "image_processor": older | {"image_mean": [0.4] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    mean = build_model(ARCHITECTURE, config, tmp_path).visual.patch_embed.mean.flatten() / 255
    layout = load_layout(tiny_config(tmp_path).model)
    oracle = AutoImageProcessor.from_pretrained(tmp_path)
    for found in (mean.tolist(), layout.image_mean, oracle.image_mean):
        assert list(found) == pytest.approx([0.4] * 3)


def test_an_architecture_without_a_class_is_refused_with_what_is_supported() -> None:
    with pytest.raises(ConfigError, match=r"'MambaForCausalLM' is not supported; supported: LlamaForCausalLM, Qwen2"):
        build_model("MambaForCausalLM", {}, Path())


def test_a_quantized_checkpoint_is_refused(tiny_model_dir: Path) -> None:
    config = tiny_config(tiny_model_dir).model
    config.hf_config["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(ConfigError, match="quantized"):
        load_model(config, torch.device("cpu"))


def test_bfloat16_stays_near_float32(tiny_model_dir: Path, tiny_model: LanguageModel) -> None:
    """The same modules in the dtype of accelerators: nothing is silently kept in, or forced to, another."""
    model = load_model(tiny_config(tiny_model_dir, dtype="bfloat16").model, torch.device("cpu"))
    assert isinstance(model, LanguageModel)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    from tests.models.test_qwen2_5_vision import encode

    picture = make_picture(6, 7)
    got, expected = encode(model, [picture]), encode(tiny_model, [picture])
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float(), expected).min() > 0.99
