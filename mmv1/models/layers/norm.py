"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.layers.linear import empty_parameter


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(hidden_size)
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops_for(x.device).rms_norm(x, self.weight, self._eps)

    def add(self, update: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [T, hidden_size] with `update` added to it: normalised, and as it is. `update` may be partial sums
        (`Linear.partial_sums`)."""
        return ops_for(residual.device).add_rms_norm(update, residual, self.weight, self._eps)
