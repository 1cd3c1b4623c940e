"""What a model computes between its matrix products and its attention, once in plain torch and once as fused kernels.

`plain.py` is the meaning and runs anywhere; `fused.py` has the same names, for CUDA, in Triton. Triton is imported only where
kernels are going to run.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

from mmv1.kernels import plain

_settings = SimpleNamespace(fused=True)


def disable_fused() -> None:
    """Plain torch on every device from now on, in this process. For measurements; to be called before a model is loaded."""
    _settings.fused = False


def uses_fused(device: torch.device) -> bool:
    return device.type == "cuda" and _settings.fused


def ops_for(device: torch.device) -> ModuleType:
    """`plain` or `fused`, whichever tensors on `device` are computed by."""
    if not uses_fused(device):
        return plain
    from mmv1.kernels import fused

    return fused
