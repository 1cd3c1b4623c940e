"""Qwen3-VL whose language model is a mixture of experts (Qwen3-VL technical report, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmv1.config import text_config
from mmv1.models.language_model import LanguageModel
from mmv1.models.qwen3 import decoder_config
from mmv1.models.qwen3_moe import mixture
from mmv1.models.qwen3_vl import join


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    text = text_config(dict(hf_config))
    experts = mixture(text, renormalize=True, are_stored_together=True)
    return join(hf_config, model_dir, decoder_config(text, head_dim=None, **experts))
