"""Qwen2-VL (Wang et al., 2024): the Qwen2 language model with M-RoPE behind a tower, which Qwen2.5-VL has in common with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmv1.config import Normalization, image_normalization, read_image_processor_config, section, text_config, whole_number
from mmv1.errors import ConfigError
from mmv1.kernels import ops_for
from mmv1.models import qwen2
from mmv1.models.full_attention_tower import FullAttentionTower
from mmv1.models.language_model import LanguageModel, Tower, is_tied, names_with_tower
from mmv1.models.layers.vision import VisionConfig

_TOWER_NAMES = {".merger.norm.": ".merger.ln_q.", ".merger.fc1.": ".merger.mlp.0.", ".merger.fc2.": ".merger.mlp.2."}


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    return join(hf_config, model_dir, _tower)


def join(
    hf_config: Mapping[str, Any], model_dir: Path, make_tower: Callable[[Mapping[str, Any], Normalization], Tower]
) -> LanguageModel:
    """`make_tower`: of config.json's vision_config and what the image processor does to pixels. Raises ConfigError."""
    text = text_config(dict(hf_config))
    scale = image_normalization(read_image_processor_config(model_dir))
    return LanguageModel(
        *qwen2.decoder_with_mrope(text),
        visual=make_tower(section(hf_config, "vision_config"), scale),
        tie_word_embeddings=is_tied(hf_config, text),
        checkpoint_names=_checkpoint_names,
    )


def _checkpoint_names(name: str) -> tuple[str, ...]:
    for own, stored in _TOWER_NAMES.items():
        name = name.replace(own, stored)
    return names_with_tower(name)


def _tower(vision: Mapping[str, Any], scale: Normalization) -> FullAttentionTower:
    if vision.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ConfigError(f"the vision tower's hidden_act '{vision['hidden_act']}' is not supported, only 'quick_gelu'")
    hidden_size = whole_number(vision, "embed_dim")
    config = VisionConfig.read(
        vision,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * whole_number(vision, "mlp_ratio", 4),
        out_hidden_size=whole_number(vision, "hidden_size"),
    )
    return FullAttentionTower(config, scale, _quick_gelu)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return ops_for(x.device).quick_gelu(x)
