"""Which class runs which architecture, and the one way to make a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mmv1.config import ModelConfig
from mmv1.errors import ConfigError
from mmv1.models.interface import Model
from mmv1.models.qwen2_5_vl import Qwen2_5_VL
from mmv1.models.weights import fill_with_dummy_weights, load_weights

_MODELS = {"Qwen2_5_VLForConditionalGeneration": Qwen2_5_VL}


def model_class(architecture: str) -> type[Qwen2_5_VL]:
    """Raises ConfigError for an architecture that has no class here."""
    if architecture not in _MODELS:
        raise ConfigError(f"architecture '{architecture}' is not supported; supported: {', '.join(sorted(_MODELS))}")
    return _MODELS[architecture]


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
    cls = model_class(config.architecture)
    if config.hf_config.get("quantization_config"):
        raise ConfigError("the checkpoint is quantized, which is not supported: use the original weights")
    with _default_dtype(getattr(torch, config.dtype)), torch.device(device):
        model = cls.from_model_dir(config.hf_config, Path(config.path))
    if config.load_format == "dummy":
        fill_with_dummy_weights(model, config.seed)
    else:
        load_weights(model, Path(config.path))
    return model.eval()
