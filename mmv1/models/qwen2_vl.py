"""Qwen2-VL (Wang et al., 2024), and what the vision-language families after it have in common with it: M-RoPE, the checkpoint's
names, the way the two parts are joined."""

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
from mmv1.models.language_model import LanguageModel, Tower, is_tied
from mmv1.models.layers.vision import VisionConfig

# Where checkpoints keep a part: the layout on the hub, then that of transformers 5's own modules.
_PREFIXES = {"visual.": "model.visual.", "model.": "model.language_model."}
_TOWER_NAMES = {".merger.norm.": ".merger.ln_q.", ".merger.fc1.": ".merger.mlp.0.", ".merger.fc2.": ".merger.mlp.2."}


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    return join(hf_config, model_dir, _tower, checkpoint_names)


def join(
    hf_config: Mapping[str, Any],
    model_dir: Path,
    make_tower: Callable[[Mapping[str, Any], Normalization], Tower],
    names: Callable[[str], tuple[str, ...]],
) -> LanguageModel:
    """The Qwen2 language model with M-RoPE behind a tower. Raises ConfigError."""
    text = text_config(dict(hf_config))
    scale = image_normalization(read_image_processor_config(model_dir))
    return LanguageModel(
        *qwen2.decoder_with_mrope(text),
        visual=make_tower(section(hf_config, "vision_config"), scale),
        tie_word_embeddings=is_tied(hf_config, text),
        checkpoint_names=names,
    )


def checkpoint_names(name: str) -> tuple[str, ...]:
    for own, stored in _TOWER_NAMES.items():
        name = name.replace(own, stored)
    return with_prefixes(name)


def with_prefixes(name: str) -> tuple[str, ...]:
    """A name as the hub's checkpoints have it, then as transformers 5's modules do."""
    for prefix, other in _PREFIXES.items():
        if name.startswith(prefix):
            return name, other + name.removeprefix(prefix)
    return (name,)


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
