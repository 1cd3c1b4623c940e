"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.layers.linear import Linear, MergedLinear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product (SwiGLU; Shazeer, 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(
            hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}, bias=bias, aligned=True
        )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, aligned=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum to be added to the residual stream, or its partial sums."""
        return self.down_proj.partial_sums(ops_for(x.device).silu_and_mul(self.gate_up_proj(x)))


class PlainMLP(nn.Module):
    """fc2(activation(fc1(x))), both with a bias."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size, bias=True)
        self.fc2 = Linear(intermediate_size, hidden_size, bias=True)
        self._activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self._activation(self.fc1(x)))
