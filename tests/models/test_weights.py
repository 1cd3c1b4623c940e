"""Loading: name dialects, shards, tied heads, dummy weights, and what a broken directory is told."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from examples.tiny_model import make_tiny_model
from mmv1.errors import ConfigError
from mmv1.models.language_model import LanguageModel
from mmv1.models.registry import load_model
from tests.models.test_qwen2_5_vl import as_flat
from tests.runner.driver import tiny_config


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def load(path: Path, **args: object) -> LanguageModel:
    model = load_model(tiny_config(path, **args).model, torch.device("cpu"))
    assert isinstance(model, LanguageModel)
    return model


def rewrite(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of the checkpoint; None removes."""
    tensors = load_file(path / "model.safetensors") | change
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path / "model.safetensors")


def assert_same_weights(model: LanguageModel, other: LanguageModel) -> None:
    theirs = other.state_dict()
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, theirs[name]), name


def test_merged_and_folded_parameters_hold_the_checkpoints_numbers(tiny_model: LanguageModel, tiny_model_dir: Path) -> None:
    stored = load_file(tiny_model_dir / "model.safetensors")
    attention = tiny_model.model.layers[1].self_attn
    for kind in ("weight", "bias"):
        parts = [stored[f"model.layers.1.self_attn.{x}_proj.{kind}"] for x in "qkv"]
        assert torch.equal(getattr(attention.qkv_proj, kind), torch.cat(parts))
    kernel = stored["visual.patch_embed.proj.weight"]
    weight = tiny_model.visual.patch_embed.weight
    assert not weight[:, 588:].any()
    assert torch.equal(weight[:, :588], (kernel[:, :, 0] + kernel[:, :, 1]).flatten(1))


def test_both_dialects_load_the_same(tiny_model: LanguageModel, model_dir: Path) -> None:
    """The names of transformers 5's modules with the nested config, those of the hub's checkpoints with the flat one."""
    config = json.loads((model_dir / "config.json").read_text())
    hub = load_file(model_dir / "model.safetensors")
    assert all(name.startswith(("visual.", "model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")) for name in hub)
    (model_dir / "config.json").write_text(json.dumps(as_flat(config)))
    assert_same_weights(load(model_dir), tiny_model)
    nested = {
        name if name.startswith("lm_head.")
        else f"model.{name}" if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in hub.items()
    }
    save_file(nested, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text(json.dumps(config))
    assert_same_weights(load(model_dir), tiny_model)


def shard(path: Path) -> dict[str, str]:
    """Cut the checkpoint in three files with an index. Returns the index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in weight_map if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_sharded_checkpoint_loads_the_same(tiny_model: LanguageModel, model_dir: Path) -> None:
    shard(model_dir)
    save_file({"stray": torch.zeros(1)}, model_dir / "another.safetensors")  # not in the index: not read
    assert_same_weights(load(model_dir), tiny_model)


def test_a_shard_that_is_missing_or_elsewhere_is_named(model_dir: Path) -> None:
    weight_map = shard(model_dir)
    (model_dir / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00003"):
        load(model_dir)
    weight_map["lm_head.weight"] = "../model-00001-of-00003.safetensors"
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match="weight files"):
        load(model_dir)


@pytest.mark.parametrize("repeated", [False, True], ids=["absent", "repeated"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, repeated: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(path, {"lm_head.weight": embedding.clone() if repeated else None})
    with caplog.at_level(logging.WARNING, "mmv1"):
        model = load(path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, embedding)
    assert not caplog.records


@pytest.mark.parametrize(
    ("flat", "outer", "inner"),  # in a flat config there is one place to say it
    [(True, outer, None) for outer in (None, False, True)]
    + [(False, outer, inner) for outer in (None, False, True) for inner in (None, False, True)],
)
@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_the_head_is_tied_when_transformers_ties_it(
    flat: bool, outer: bool | None, inner: bool | None, head: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Whoever says it, and whatever else is stored."""
    path = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    if inner is not None:
        config["text_config"]["tie_word_embeddings"] = inner
    if flat:
        config = as_flat(config)
    if outer is not None:
        config["tie_word_embeddings"] = outer
    (path / "config.json").write_text(json.dumps(config))
    if head != "different":
        embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
        rewrite(path, {"lm_head.weight": None if head == "absent" else embedding.clone()})
    if head == "absent" and not (outer or inner):
        with pytest.raises(ConfigError, match=r"lm_head\.weight"):  # where transformers draws random numbers
            load(path)
        return
    oracle = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    model = load(path)
    assert torch.equal(model.lm_head.weight, oracle.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, oracle.model.language_model.embed_tokens.weight)


def test_a_missing_tensor_is_named(model_dir: Path) -> None:
    rewrite(model_dir, {"model.layers.2.mlp.up_proj.weight": None})
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        load(model_dir)


def test_a_wrong_shape_is_named(model_dir: Path) -> None:
    rewrite(model_dir, {"model.layers.0.self_attn.k_proj.weight": torch.zeros(3, 64)})
    with pytest.raises(ConfigError, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight'.*\[3, 64\]"):
        load(model_dir)


def test_a_transposed_tensor_of_the_right_size_is_refused(model_dir: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    rewrite(model_dir, {"model.layers.0.mlp.down_proj.weight": stored.T})
    with pytest.raises(ConfigError, match="down_proj"):
        load(model_dir)


def test_leftover_tensors_are_warned_about_once(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(model_dir, {"model.rotary_emb.inv_freq": torch.zeros(8)})
    with caplog.at_level(logging.WARNING, "mmv1"):
        load(model_dir)
        assert not caplog.records
        rewrite(model_dir, {"extra.b": torch.zeros(8), "extra.a": torch.zeros(8)})
        load(model_dir)
    assert [record.getMessage() for record in caplog.records] == ["2 tensors of the checkpoint are not used, such as 'extra.a'"]


def test_no_safetensors_and_damaged_ones(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(model_dir)
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        load(model_dir)


def test_dummy_weights_follow_the_seed_and_read_no_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    first, again, other = (load(model_dir, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert_same_weights(first, again)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert all(p.isfinite().all() for p in first.parameters())
    assert (first.model.norm.weight == 1).all()
