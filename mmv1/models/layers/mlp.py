"""The gated feed-forward layer (SwiGLU; Shazeer, 2020)."""

from __future__ import annotations

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.layers.linear import Linear, MergedLinear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(
            hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}, bias=bias, aligned=True
        )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, aligned=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum to be added to the residual stream, or its partial sums."""
        return self.down_proj.partial_sums(ops_for(x.device).silu_and_mul(self.gate_up_proj(x)))
