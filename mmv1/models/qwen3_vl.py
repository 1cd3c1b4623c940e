"""Qwen3-VL (Qwen3-VL technical report, 2025): learned positions stretched over the picture, an embedding of several levels that
enter the language model after its first layers (DeepStack), and M-RoPE whose axes take turns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from mmv1.config import (
    Normalization,
    image_normalization,
    read_image_processor_config,
    section,
    text_config,
    whole_number,
    whole_numbers,
)
from mmv1.errors import ConfigError
from mmv1.models.decoder import DecoderConfig, mrope_sections, rope_settings
from mmv1.models.full_attention_tower import FullAttentionTower
from mmv1.models.language_model import LanguageModel, is_tied, names_with_tower
from mmv1.models.layers.rotary import RotaryEmbedding, interleaved_axes, inverse_frequencies
from mmv1.models.layers.vision import VisionConfig
from mmv1.models.qwen3 import decoder_config


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    return join(hf_config, model_dir, decoder_config(text_config(dict(hf_config))))


def join(hf_config: Mapping[str, Any], model_dir: Path, config: DecoderConfig) -> LanguageModel:
    """A Qwen3 language model behind the tower. Raises ConfigError."""
    text = text_config(dict(hf_config))
    _, theta, rope = rope_settings(text, types=("default", "mrope"), theta=500_000.0)
    axes = interleaved_axes(mrope_sections(rope, (24, 20, 20), config.head_dim))
    tower = _tower(section(hf_config, "vision_config"), image_normalization(read_image_processor_config(model_dir)))
    if tower.embedding_width > (1 + config.num_layers) * config.hidden_size:
        raise ConfigError("config.json: deepstack_visual_indexes name more levels than the language model has layers")
    return LanguageModel(
        config,
        RotaryEmbedding(inverse_frequencies(config.head_dim, theta), axes),
        visual=tower,
        tie_word_embeddings=is_tied(hf_config, text),
        checkpoint_names=checkpoint_names,
    )


def checkpoint_names(name: str) -> tuple[str, ...]:
    """The hub's checkpoints have the names of transformers 5's modules."""
    if name.startswith("visual."):
        name = name.replace(".fc1.", ".linear_fc1.").replace(".fc2.", ".linear_fc2.")
    return tuple(reversed(names_with_tower(name)))


def _tower(vision: Mapping[str, Any], scale: Normalization) -> FullAttentionTower:
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ConfigError(f"the vision tower's hidden_act '{vision['hidden_act']}' is not supported, only 'gelu_pytorch_tanh'")
    return FullAttentionTower(
        VisionConfig.read(vision),
        scale,
        partial(F.gelu, approximate="tanh"),
        patch_bias=True,
        num_positions=whole_number(vision, "num_position_embeddings"),
        levels=whole_numbers(vision, "deepstack_visual_indexes", ()),
    )
