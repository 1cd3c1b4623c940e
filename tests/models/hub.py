"""A tiny model's directory as the hub's are written: config.json and weights in the dialect of transformers 4, where
tiny_model.py has that of transformers 5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def as_hub(model_dir: Path, out: Path) -> Path:
    """A copy in the hub's dialect."""
    shutil.copytree(model_dir, out)
    change_config(out, _hub_config)
    if (out / "preprocessor_config.json").exists():
        (out / "video_preprocessor_config.json").unlink()
    change_weights(out, _with_inputs_first)
    return out


def change_config(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(change(config)))


def change_weights(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(path / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})


def as_modules(tensors: Tensors) -> Tensors:
    """The names of transformers 5's own modules, where the hub's checkpoints of Qwen2-VL have other ones."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    return renamed


def _hub_config(config: dict[str, Any]) -> dict[str, Any]:
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.0"
    if "text_config" not in config:
        return _hub_text(config)
    text, vision = _hub_text(config.pop("text_config")), config["vision_config"]
    del vision["rope_parameters"]
    if not config["model_type"].startswith("qwen2"):
        vision["model_type"] = config["model_type"]
        return {**config, "text_config": text}
    del vision["model_type"]
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": vision["patch_size"]}
    return {**text, **config}  # one object for all of it


def _hub_text(text: dict[str, Any]) -> dict[str, Any]:
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope and "mrope_interleaved" not in rope:
        rope = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    text.pop("layer_types", None)
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    return text


def _with_inputs_first(tensors: Tensors) -> Tensors:
    """The experts of a layer that are one tensor: [experts, inputs, outputs]."""
    together = (".experts.gate_up_proj", ".experts.down_proj")
    return {name: tensor.transpose(1, 2) if name.endswith(together) else tensor for name, tensor in tensors.items()}
