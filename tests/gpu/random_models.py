"""Random models of real shapes: as wide as the published ones of their family, some as deep, in bfloat16."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.tiny_model import TRAINING_TEXT, write_processor_files, write_tokenizer

DEVICE = torch.device("cuda")
# Weights are drawn so that a matrix multiplies the size of what passes through it by this. Below 1 a picture moves the answer
# little; from 1.4 on a random model is chaotic, and rounding moves it as much as a picture does.
GAIN = 1.1
# A mixture's router: where it hardly prefers one expert to the next, rounding chooses another, which is no small change.
ROUTER_GAIN = 2.2
MAX_PICTURE_TOKENS = 1280


@dataclass(frozen=True)
class Shape:
    """A language model and the vision tower before it. `vision_layers` and those below are of the published tower."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    vision_layers: int = 32
    vision_hidden_size: int = 1280
    vision_intermediate_size: int = 3420
    vision_heads: int = 16
    family: str = "qwen2_5_vl"
    num_experts: int = 0
    experts_per_token: int = 8
    expert_size: int = 768

    @property
    def patch_size(self) -> int:
        return 14 if self.family == "qwen2_5_vl" else 16


QWEN3_TOWER = {"vision_layers": 27, "vision_hidden_size": 1152, "vision_intermediate_size": 4304}
SHAPES = {
    "3B": Shape(36, 2048, 11008, 16, 2, 151936, True),
    "7B, 8 layers": Shape(8, 3584, 18944, 28, 4, 152064, False),
    "Qwen3-VL-8B, 6 layers": Shape(6, 4096, 12288, 32, 8, 151936, False, **QWEN3_TOWER, family="qwen3_vl"),
    "Qwen3-VL-30B-A3B, 4 layers": Shape(
        4, 2048, 6144, 32, 4, 151936, False, **QWEN3_TOWER, family="qwen3_vl_moe", num_experts=128
    ),
}


def find_or_make(shape: Shape, folder: Path) -> Path:
    """The model's directory in `folder`, made if it is not there."""
    key = f"{shape} {GAIN} {version('torch')} {version('transformers')} {Path(__file__).read_text()}"
    path = folder / f"random-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder, prefix="unfinished-"))
        try:
            make_random_model(shape, unfinished)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


def make_random_model(shape: Shape, out: Path, seed: int = 0) -> None:
    """Write a complete model directory; the same for the same seed on the same kind of device."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    token_ids = write_tokenizer(out, TRAINING_TEXT, vocab_size=512)
    pixels_per_token = (2 * shape.patch_size) ** 2
    write_processor_files(
        out, 4 * pixels_per_token, MAX_PICTURE_TOKENS * pixels_per_token, patch_size=shape.patch_size
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(), DEVICE:
            model = AutoModelForImageTextToText.from_config(config_of(shape, token_ids))
    finally:
        torch.set_default_dtype(default)
    _draw_weights(model, torch.Generator(DEVICE).manual_seed(seed))
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(out)


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            is_experts = parameter.dim() == 3  # [experts, outputs, inputs]
            num_inputs = parameter.shape[-1] if is_experts else parameter[0].numel()
            gain = ROUTER_GAIN if name.endswith(".mlp.gate.weight") else GAIN
            parameter.normal_(0.0, gain / math.sqrt(num_inputs), generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.2, generator=generator)
        else:
            parameter.normal_(1.0, 0.1, generator=generator)


def config_of(shape: Shape, token_ids: dict[str, int]) -> Any:
    from transformers import CONFIG_MAPPING

    text = {name: getattr(shape, name) for name in ("hidden_size", "intermediate_size", "vocab_size")} | {
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "tie_word_embeddings": shape.tied,
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden_size,
        "intermediate_size": shape.vision_intermediate_size,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden_size,
        "patch_size": shape.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    add = _add_qwen2_5 if shape.family == "qwen2_5_vl" else _add_qwen3
    add(shape, text, vision)
    return CONFIG_MAPPING[shape.family](
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
    )


def _add_qwen2_5(shape: Shape, text: dict[str, Any], vision: dict[str, Any]) -> None:
    every_fourth = shape.vision_layers // 4
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision |= {
        "window_size": 112,
        "fullatt_block_indexes": [every_fourth * (quarter + 1) - 1 for quarter in range(4)],
        "tokens_per_second": 2,
    }


def _add_qwen3(shape: Shape, text: dict[str, Any], vision: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text |= {"head_dim": 128, "rope_parameters": rope}
    if shape.num_experts:
        text |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    vision |= {
        "num_position_embeddings": 48 * 48,
        "deepstack_visual_indexes": [shape.vision_layers * place // 27 for place in (8, 16, 24)],
    }
