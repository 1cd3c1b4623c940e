"""The Qwen2 and Qwen2.5 language models (Qwen2 technical report, 2024), with the rope of text alone or, behind a vision tower,
M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmv1.models.decoder import DecoderConfig, mrope_sections, rope_settings
from mmv1.models.language_model import LanguageModel, is_tied
from mmv1.models.layers.rotary import RotaryEmbedding, inverse_frequencies, sectioned_axes


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    config = DecoderConfig.from_hf(hf_config, qkv_bias=True)
    _, theta, _ = rope_settings(hf_config, types=("default",), theta=10_000.0)
    rotary = RotaryEmbedding(inverse_frequencies(config.head_dim, theta))
    return LanguageModel(config, rotary, tie_word_embeddings=is_tied(hf_config))


def decoder_with_mrope(text: Mapping[str, Any]) -> tuple[DecoderConfig, RotaryEmbedding]:
    """Raises ConfigError."""
    config = DecoderConfig.from_hf(text, qkv_bias=True, rms_norm_eps=1e-5)
    _, theta, rope = rope_settings(text, types=("default", "mrope"), theta=1_000_000.0)
    sections = mrope_sections(rope, (16, 24, 24), config.head_dim)
    return config, RotaryEmbedding(inverse_frequencies(config.head_dim, theta), sectioned_axes(sections))
