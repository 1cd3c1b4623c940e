"""Self-attention of a decoder layer: the projections. Rotation, cache and attention itself are of whom the runner chose."""

from __future__ import annotations

import torch
from torch import nn

from mmv1.models.interface import StepAttention
from mmv1.models.layers.linear import Linear, MergedLinear
from mmv1.models.layers.norm import RMSNorm
from mmv1.models.layers.rotary import Rope


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with q, k and v from one product. `head_norm_eps`: that of a norm of each
    query and key before they are rotated (Henry et al., 2020); None: there is none."""

    def __init__(
        self,
        layer_index: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        o_bias: bool = False,
        head_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self._layer_index = layer_index
        self._num_kv_heads, self._head_dim = num_kv_heads, head_dim
        self._scale = head_dim**-0.5
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.qkv_proj = MergedLinear(hidden_size, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, bias=qkv_bias)
        self.o_proj = Linear(q_size, hidden_size, bias=o_bias)
        self._has_head_norm = head_norm_eps is not None
        if head_norm_eps is not None:
            self.q_norm, self.k_norm = RMSNorm(head_dim, head_norm_eps), RMSNorm(head_dim, head_norm_eps)

    def forward(self, hidden: torch.Tensor, rope: Rope, attention: StepAttention) -> torch.Tensor:
        """`hidden` [T, hidden_size]; returns as much to be added to the residual stream, or its partial sums."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self._head_dim))  # [T, heads + 2 kv_heads, head_dim]
        head_norm = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self._has_head_norm else ()
        attended = attention(self._layer_index, qkv, self._num_kv_heads, rope, self._scale, *head_norm)  # [T, heads, head_dim]
        return self.o_proj.partial_sums(attended.flatten(1))
