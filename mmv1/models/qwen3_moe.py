"""The Qwen3 language models with a mixture of experts (Qwen3 technical report, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmv1.config import whole_number, whole_numbers
from mmv1.errors import ConfigError
from mmv1.models.language_model import LanguageModel
from mmv1.models.layers.moe import ExpertsConfig
from mmv1.models.qwen3 import decoder_config, of_text


def build(hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Raises ConfigError."""
    renormalize = bool(hf_config.get("norm_topk_prob", False))
    experts = mixture(hf_config, renormalize=renormalize, are_stored_together=False)
    return of_text(hf_config, decoder_config(hf_config, head_dim=None, **experts))


def mixture(text: Mapping[str, Any], *, renormalize: bool, are_stored_together: bool) -> dict[str, Any]:
    """For `qwen3.decoder_config`. Raises ConfigError."""
    experts = ExpertsConfig(
        num_experts=whole_number({"num_experts": text.get("num_local_experts"), **text}, "num_experts"),  # as 5 and 4 spell it
        num_experts_per_token=whole_number(text, "num_experts_per_tok"),
        intermediate_size=whole_number(text, "moe_intermediate_size"),
        renormalize=renormalize,
        are_stored_together=are_stored_together,
    )
    if experts.num_experts_per_token > experts.num_experts:
        raise ConfigError(f"config.json: num_experts_per_tok {experts.num_experts_per_token} is more than num_experts")
    every = whole_number(text, "decoder_sparse_step", 1)
    dense = set(whole_numbers(text, "mlp_only_layers", ()))
    layers = range(whole_number(text, "num_hidden_layers"))
    return {"experts": experts, "sparse_layers": frozenset(i for i in layers if (i + 1) % every == 0 and i not in dense)}
