"""Llama 3, 3.1, 3.2 and 3.3 (Grattafiori et al., 2024), and other models of this architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmv1.config import positive_number, whole_number
from mmv1.models.decoder import DecoderConfig, rope_settings
from mmv1.models.language_model import LanguageModel, is_tied
from mmv1.models.layers.rotary import RotaryEmbedding, inverse_frequencies, llama3_frequencies


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    bias = bool(hf_config.get("attention_bias"))
    config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf_config.get("mlp_bias")))
    rope_type, theta, rope = rope_settings(hf_config, types=("default", "llama3"), theta=10_000.0)
    frequencies = inverse_frequencies(config.head_dim, theta)
    if rope_type == "llama3":
        frequencies = llama3_frequencies(
            frequencies,
            factor=positive_number(rope, "factor", 8.0),
            low_freq_factor=positive_number(rope, "low_freq_factor", 1.0),
            high_freq_factor=positive_number(rope, "high_freq_factor", 4.0),
            original_len=whole_number(rope, "original_max_position_embeddings", 8192),
        )
    return LanguageModel(config, RotaryEmbedding(frequencies), tie_word_embeddings=is_tied(hf_config))
