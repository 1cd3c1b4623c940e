"""Which family runs which architecture, and the one way to make a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmv1.config import ModelConfig
from mmv1.errors import ConfigError
from mmv1.models import llama, qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_moe, qwen3_vl, qwen3_vl_moe
from mmv1.models.interface import Model
from mmv1.models.language_model import LanguageModel
from mmv1.models.weights import fill_with_dummy_weights, load_weights

# Of config.json and the model directory: a model with memory for its weights, not yet filled. Raises ConfigError.
_BUILDERS: dict[str, Callable[[Mapping[str, Any], Path], LanguageModel]] = {
    "LlamaForCausalLM": llama.build,
    "Qwen2ForCausalLM": qwen2.build,
    "Qwen2VLForConditionalGeneration": qwen2_vl.build,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl.build,
    "Qwen3ForCausalLM": qwen3.build,
    "Qwen3MoeForCausalLM": qwen3_moe.build,
    "Qwen3VLForConditionalGeneration": qwen3_vl.build,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe.build,
}


def build_model(architecture: str, hf_config: Mapping[str, Any], model_dir: Path) -> LanguageModel:
    """Modules with memory for their weights, on the current default device and dtype. Raises ConfigError, also for an
    architecture that has no family here."""
    if architecture not in _BUILDERS:
        raise ConfigError(f"architecture '{architecture}' is not supported; supported: {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[architecture](hf_config, model_dir)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def load_model(config: ModelConfig, device: torch.device) -> Model:
    """The model, its weights on `device` in the configured dtype. Raises ConfigError when the directory does not fit."""
    if config.hf_config.get("quantization_config"):
        raise ConfigError("the checkpoint is quantized, which is not supported: use the original weights")
    with _default_dtype(getattr(torch, config.dtype)), torch.device(device):
        model = build_model(config.architecture, config.hf_config, Path(config.path))
    if config.load_format == "dummy":
        fill_with_dummy_weights(model, config.seed)
    else:
        load_weights(model, Path(config.path))
    return model.eval()
