"""Matrix products, several checkpoint matrices side by side in one where the same input meets them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmv1.models.weights import Piece, parent_path


def empty_parameter(*shape: int) -> nn.Parameter:
    """Memory for a weight, on the current default device and dtype, to be filled by the loader."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b. `weight` [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Linear layers of the same input as one product, their outputs side by side (q, k, v; gate, up).

    `parts`: the name of each layer in the checkpoint, beside which this one stands, and its number of outputs.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self._parts = dict(parts)

    def checkpoint_pieces(self, path: str) -> Iterator[Piece]:
        start = 0
        for name, rows in self._parts.items():
            for kind, parameter in self.named_parameters(recurse=False):
                target = parameter[start : start + rows]
                yield Piece(target, f"{parent_path(path)}.{name}.{kind}", tuple(target.shape))
            start += rows
