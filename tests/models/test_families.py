"""Every family's directory, as the hub has it and as transformers 5 saves it; types, tied heads, shards; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText

from examples.tiny_model import FAMILIES, VISION_FAMILIES, make_tiny_model
from mmv1.errors import ConfigError
from mmv1.models.registry import build_model
from mmv1.preprocess.layout import load_layout
from tests.models.hub import as_hub, as_modules, change_config, change_weights
from tests.models.test_weights import assert_same_weights, load, shard
from tests.oracle import HFOracle
from tests.runner.driver import Driver, Prompt, hf_inputs, make_picture, make_prompt, patch_of, tiny_config

ModelDirs = Callable[[str], Path]


def prompt_for(family: str, model_dir: Path) -> Prompt:
    """With text before and behind two pictures, where the family sees."""
    if family not in VISION_FAMILIES:
        return make_prompt([100], image_token_id=-1)
    image_token_id = json.loads((model_dir / "config.json").read_text())["image_token_id"]
    pictures = [make_picture(*size, patch=patch_of(family)) for size in ((3, 4), (1, 5))]
    return make_prompt([9, pictures[0], 5, pictures[1], 7], image_token_id=image_token_id)


def logits(family: str, model_dir: Path, **args: Any) -> torch.Tensor:
    driver = Driver(tiny_config(model_dir, **args))
    try:
        return driver.first_logits(prompt_for(family, model_dir))
    finally:
        driver.close()


def reference_logits(family: str, model_dir: Path) -> torch.Tensor:
    oracle, prompt = HFOracle(model_dir), prompt_for(family, model_dir)
    with torch.inference_mode():
        inputs = hf_inputs(prompt, oracle.processor, getattr(oracle.model.config, "image_token_id", -1))
        return oracle.model(**inputs).logits[0, -1]


def assert_as_transformers(family: str, model_dir: Path) -> None:
    torch.testing.assert_close(logits(family, model_dir), reference_logits(family, model_dir), atol=1e-4, rtol=1e-5)


# ---- dialects -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hubs_dialect_means_the_same(family: str, tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    """transformers reads both alike, so the rewritten directory is in the hub's dialect."""
    model_dir = tiny_model_dirs(family)
    hub = as_hub(model_dir, tmp_path / "hub")
    text = (hub / "config.json").read_text()
    assert "torch_dtype" in text and "rope_theta" in text and "rope_parameters" not in text and "num_local_experts" not in text
    assert_same_weights(load(hub), load(model_dir))
    assert torch.equal(logits(family, hub), logits(family, model_dir))
    assert_as_transformers(family, hub)
    assert tiny_config(hub).model.eos_token_ids == tiny_config(model_dir).model.eos_token_ids


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_names_of_modules_mean_the_same(family: str, tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model_dirs(family), tmp_path / "model")
    change_weights(path, as_modules)
    assert {name.split(".")[1] for name in load_file(path / "model.safetensors")} == {"visual", "language_model", "weight"}
    assert_same_weights(load(path), load(tiny_model_dirs(family)))


def test_the_hubs_experts_are_stored_in_both_ways(tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    together = load_file(as_hub(tiny_model_dirs("qwen3_vl_moe"), tmp_path / "a") / "model.safetensors")
    mlp = "model.language_model.layers.0.mlp"
    assert together[f"{mlp}.experts.gate_up_proj"].shape == (8, 64, 2 * 48)  # experts, inputs, outputs
    assert together[f"{mlp}.experts.down_proj"].shape == (8, 48, 64)
    apart = load_file(as_hub(tiny_model_dirs("qwen3_moe"), tmp_path / "b") / "model.safetensors")
    assert apart["model.layers.0.mlp.experts.7.gate_proj.weight"].shape == (48, 64)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("says", ["numbers", "size", "size, older names"])
def test_every_spelling_of_pixel_limits(family: str, says: str, tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model_dirs(family), tmp_path / "model")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    for name in ("min_pixels", "max_pixels", "size"):
        settings.pop(name, None)
    low, high = 3 * 4096, 50 * 4096
    settings |= {
        "numbers": {"min_pixels": low, "max_pixels": high},
        "size": {"size": {"shortest_edge": low, "longest_edge": high}},
        "size, older names": {"size": {"min_pixels": low, "max_pixels": high}},
    }[says]
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    layout = load_layout(tiny_config(path).model)
    place = layout.place(640, 410)
    assert (layout.patch_size, place.num_tokens * 4) == (patch_of(family), place.grid_thw[1] * place.grid_thw[2])
    if says != "size, older names":  # which transformers 5 refuses
        assert AutoImageProcessor.from_pretrained(path).get_number_of_image_patches(410, 640) == place.num_tokens * 4
    assert low <= place.resized_height * place.resized_width <= high < 410 * 640


@pytest.mark.parametrize("family", FAMILIES)
def test_every_end_of_sequence_id_counts(family: str, tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    """generation_config.json's list, and config.json's, which may be one too."""
    path = shutil.copytree(tiny_model_dirs(family), tmp_path / "model")
    said = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    assert len(said) == 2
    change_config(path, lambda config: config | {"eos_token_id": [said[1], 7, 9]})
    assert tiny_config(path).model.eos_token_ids == (*said, 7, 9)


# ---- weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_is_the_embedding(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tied", family=family, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load(path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert_as_transformers(family, path)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_experts_in_shards_load_the_same(family: str, tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    """Parts of one parameter lie in several files."""
    path = as_hub(tiny_model_dirs(family), tmp_path / "model")
    files = set(shard(path).values())
    assert len(files) == 3 and not (path / "model.safetensors").exists()
    assert_same_weights(load(path), load(tiny_model_dirs(family)))


def test_an_expert_that_is_missing_is_named(tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model_dirs("qwen3_moe"), tmp_path / "model")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    change_weights(path, lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name})
    with pytest.raises(ConfigError, match=re.escape(f"no tensor '{name}'")):
        load(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.99), ("float16", 0.9999)])
def test_half_precision_stays_near_float32(family: str, dtype: str, near: float, tiny_model_dirs: ModelDirs) -> None:
    """The same modules in the dtypes of accelerators: nothing is silently kept in, or forced to, another."""
    model_dir = tiny_model_dirs(family)
    assert {parameter.dtype for parameter in load(model_dir, dtype=dtype).parameters()} == {getattr(torch, dtype)}
    got, expected = logits(family, model_dir, dtype=dtype), logits(family, model_dir)
    assert got.dtype == getattr(torch, dtype)
    assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=0) > near


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe", "llama"])
def test_stored_in_half_precision(family: str, stored: torch.dtype, tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    path = as_hub(tiny_model_dirs(family), tmp_path / "model")
    change_weights(path, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    change_config(path, lambda config: config | {"torch_dtype": str(stored).removeprefix("torch.")})
    assert_as_transformers(family, path)  # in float32, as on any CPU


# ---- what config.json may say -------------------------------------------------------------------------------------------


def changed(config: dict[str, Any], part: str, change: dict[str, Any]) -> dict[str, Any]:
    """`part`: the name of the object in it, or "" for the language model's own. What is None is not said."""
    target = config[part] if part else config.get("text_config", config)
    target |= change
    for name in [name for name, value in change.items() if value is None]:
        del target[name]
    return config



@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 8}),
        ("qwen3_vl_moe", {"norm_topk_prob": False}),  # transformers does not read it
        ("qwen3_vl_moe", {"head_dim": None}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("llama", {"head_dim": None}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen3", {"rms_norm_eps": 1e-2}),
    ],
)
def test_what_config_says_is_done(family: str, change: dict[str, Any], tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_model_dirs(family), tmp_path / "model")
    change_config(path, lambda config: changed(config, "", change))
    assert_as_transformers(family, path)


PUBLISHED = {
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}


@pytest.mark.parametrize(
    ("family", "change"),
    [("qwen3_vl", PUBLISHED), ("qwen3_vl_moe", PUBLISHED), *((family, {}) for family in FAMILIES if family[:5] != "qwen2")],
)
def test_angles_equal_transformers(family: str, change: dict[str, Any], tiny_model_dirs: ModelDirs, tmp_path: Path) -> None:
    """At positions so far apart, on every axis, that the slowest frequency counts."""
    path = shutil.copytree(tiny_model_dirs(family), tmp_path / "model")
    change_config(path, lambda config: changed(config, "", change))
    config = json.loads((path / "config.json").read_text())
    model = build_model(config["architectures"][0], config, path)
    kind = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    theirs = kind.from_config(AutoConfig.from_pretrained(path)).model
    rotary = getattr(theirs, "language_model", theirs).rotary_emb
    positions = torch.randint(0, 250_000, (model.num_position_axes, 50), generator=torch.Generator().manual_seed(0))
    expected = rotary(torch.zeros(1), positions.unsqueeze(1) if family in VISION_FAMILIES else positions)
    for mine, whole in zip(model.model.rotary_emb(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(mine, whole[0, :, : mine.shape[1]], atol=1e-5, rtol=0)


TEXT_FAMILIES = [family for family in FAMILIES if family not in VISION_FAMILIES]
REFUSED: list[tuple[list[str], str, dict[str, Any], str]] = [
    (["qwen2", "qwen3", "qwen3_moe", "qwen2_vl"], "", {"use_sliding_window": True}, "sliding windows are not supported"),
    (["qwen2", "qwen3"], "", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows are not supported"),
    (TEXT_FAMILIES, "", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    (TEXT_FAMILIES, "", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope type 'linear' is not supported"),
    (["qwen3_vl", "qwen2_vl"], "", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
    (["qwen3", "qwen2"], "", {"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
    ([*FAMILIES], "", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ([*FAMILIES], "", {"num_key_value_heads": 3}, "no multiple of its num_key_value_heads"),
    (["qwen2_vl", "qwen3_vl"], "vision_config", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    (["qwen3_vl", "qwen2_vl"], "", {"rope_parameters": {"mrope_section": [4, 4, 4]}}, "mrope_section .* half of head_dim 16"),
    (["qwen3_vl", "qwen2_vl"], "", {"rope_parameters": {"mrope_section": [4, 4]}}, "mrope_section .* half of head_dim 16"),
    (["qwen3_vl", "qwen3_vl_moe"], "vision_config", {"deepstack_visual_indexes": [2, 1]}, "deepstack_visual_indexes"),
    (["qwen3_vl"], "vision_config", {"deepstack_visual_indexes": [0, 4]}, "deepstack_visual_indexes"),  # of 4 layers
    (["qwen3_vl"], "", {"num_hidden_layers": 2}, "deepstack_visual_indexes name more levels"),
    (["qwen3_moe", "qwen3_vl_moe"], "", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts"),
    (["qwen3_moe"], "", {"num_local_experts": None}, "does not say num_experts"),
    (["qwen2_vl"], "vision_config", {"hidden_size": 32}, "out_hidden_size is not the language model's hidden_size"),
    (["qwen3_vl"], "vision_config", {"out_hidden_size": 32}, "out_hidden_size is not the language model's hidden_size"),
    (["qwen2_vl"], "vision_config", {"num_heads": 16}, "a head of the vision tower"),
]


@pytest.mark.parametrize(
    ("family", "part", "change", "message"),
    [(family, *rest) for families, *rest in REFUSED for family in families],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused_in_one_sentence(
    family: str, part: str, change: dict[str, Any], message: str, tiny_model_dirs: ModelDirs
) -> None:
    model_dir = tiny_model_dirs(family)
    config = changed(json.loads((model_dir / "config.json").read_text()), part, change)
    with pytest.raises(ConfigError, match=message) as refusal:
        build_model(config["architectures"][0], config, model_dir)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_processor_that_cuts_otherwise_than_the_tower_is_refused(
    family: str, tiny_model_dirs: ModelDirs, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_model_dirs(family), tmp_path / "model")
    change_config(path, lambda config: changed(config, "vision_config", {"patch_size": 8}))
    with pytest.raises(ConfigError, match=rf"says patch_size {patch_of(family)} where config.json has patch_size 8"):
        load_layout(tiny_config(path).model)
