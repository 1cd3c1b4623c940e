"""Normalisation of the residual stream, alone and together with the addition before it."""

from __future__ import annotations

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.layers.linear import empty_parameter


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(hidden_size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops_for(x.device).rms_norm(x, self.weight, self.eps)

    def add(self, update: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [T, hidden_size] with `update` added to it: normalised, and as it is. `update` may be partial sums
        (`Linear.partial_sums`)."""
        return ops_for(residual.device).add_rms_norm(update, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last axis, computed in float32 (Ba, Kiros and Hinton, 2016)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(hidden_size)
        self.bias = empty_parameter(hidden_size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops_for(x.device).layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, update: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `RMSNorm.add`."""
        return ops_for(residual.device).add_layer_norm(update, residual, self.weight, self.bias, self.eps)
