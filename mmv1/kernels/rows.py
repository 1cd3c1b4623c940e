"""What every kernel here asks of its tensors."""

from __future__ import annotations

import torch


def check_rows(*tensors: torch.Tensor) -> None:
    """Raises ValueError unless each tensor's last axis lies side by side in memory: kernels step from row to row by a stride, and
    inside a row by one."""
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(f"a kernel was given a tensor of shape {list(tensor.shape)} and strides {tensor.stride()}")
