"""The Qwen3 language models (Qwen3 technical report, 2025): a norm on every query and key instead of biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmv1.models.decoder import DecoderConfig, rope_settings
from mmv1.models.language_model import LanguageModel, is_tied
from mmv1.models.layers.rotary import RotaryEmbedding, inverse_frequencies


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    return of_text(hf_config, decoder_config(hf_config))


def of_text(hf_config: Mapping[str, Any], config: DecoderConfig) -> LanguageModel:
    _, theta, _ = rope_settings(hf_config, types=("default",), theta=10_000.0)
    rotary = RotaryEmbedding(inverse_frequencies(config.head_dim, theta))
    return LanguageModel(config, rotary, tie_word_embeddings=is_tied(hf_config))


def decoder_config(text: Mapping[str, Any], *, head_dim: int | None = 128, **experts: Any) -> DecoderConfig:
    """`head_dim` where config.json does not say it; `experts`: those of a mixture, as `DecoderConfig` has them. Raises
    ConfigError."""
    bias = bool(text.get("attention_bias"))
    return DecoderConfig.from_hf({"head_dim": head_dim, **text}, qkv_bias=bias, o_bias=bias, head_norm=True, **experts)
