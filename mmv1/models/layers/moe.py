"""A mixture of experts in the place of a decoder layer's feed-forward part: each token goes through a few of many small ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.layers.linear import Linear, empty_parameter
from mmv1.models.weights import Piece


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    num_experts: int
    num_experts_per_token: int
    intermediate_size: int  # of one expert
    renormalize: bool  # the chosen experts' weights are made to sum to 1
    are_stored_together: bool  # in the checkpoint: all experts of a layer in one tensor


class Experts(nn.Module):
    """`gate_up_proj` [experts, 2 * intermediate_size, hidden_size], `down_proj` [experts, hidden_size, intermediate_size]."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self._config = config
        self.gate_up_proj = empty_parameter(config.num_experts, 2 * config.intermediate_size, hidden_size)
        self.down_proj = empty_parameter(config.num_experts, hidden_size, config.intermediate_size)

    def checkpoint_pieces(self, path: str) -> Iterator[Piece]:
        if self._config.are_stored_together:
            for name, parameter in self.named_parameters(recurse=False):
                yield _piece_of_all(parameter, f"{path}.{name}")
            return
        for expert in range(self._config.num_experts):
            gate, up = self.gate_up_proj[expert].chunk(2)
            for name, target in (("gate_proj", gate), ("up_proj", up), ("down_proj", self.down_proj[expert])):
                yield Piece(target, f"{path}.{expert}.{name}.weight", tuple(target.shape))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`x` [T, hidden_size]; `weights` and `ids` [T, num_experts_per_token]: see `kernels.plain.experts`."""
        return ops_for(x.device).experts(x, self.gate_up_proj, self.down_proj, weights, ids)


def _piece_of_all(parameter: torch.Tensor, name: str) -> Piece:
    """On the hub inputs come before outputs; transformers 5 writes what it, and we, compute with. As there, a tensor that could
    be either is the latter."""
    num_experts, outputs, inputs = parameter.shape

    def to_own(stored: torch.Tensor) -> torch.Tensor:
        return stored if stored.shape == parameter.shape else stored.transpose(1, 2)

    return Piece(parameter, name, (num_experts, inputs, outputs), to_own, tuple(parameter.shape))


class MixtureOfExperts(nn.Module):
    """A router's softmax chooses each token's experts; the sum of what they make of it, by its weights (Shazeer et al., 2017)."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self._config = config
        self.gate = Linear(hidden_size, config.num_experts, bias=False)
        self.experts = Experts(hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum [T, hidden_size] to be added to the residual stream."""
        config = self._config
        weights, ids = ops_for(x.device).route(self.gate(x), config.num_experts_per_token, config.renormalize)
        return self.experts(x, weights, ids)
