"""Matrix products, several checkpoint matrices side by side in one where the same input meets them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.weights import Piece, parent_path


def empty_parameter(*shape: int) -> nn.Parameter:
    """Memory for a weight, on the current default device and dtype, to be filled by the loader."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


def aligned_size(size: int) -> int:
    """`size` or a little more: the width of a matrix whose rows begin at addresses that matrix units like.

    Measured on an H100 with bf16: a product over K = 3420 runs at 188 TFLOP/s, over 3456 at 710; over 588 takes three times as
    long as over 592."""
    multiple = 64 if size >= 1024 else 8
    return -(-size // multiple) * multiple


class Linear(nn.Module):
    """y = x W^T + b. `weight` [out_features, in_features]; `aligned`: with zero columns after them, for an input that is as wide
    (`aligned_size`)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, aligned: bool = False) -> None:
        super().__init__()
        self._in_features = in_features
        self.weight = empty_parameter(out_features, aligned_size(in_features) if aligned else in_features)
        self.weight[:, in_features:].zero_()
        self.bias = empty_parameter(out_features) if bias else None

    def checkpoint_pieces(self, path: str) -> Iterator[Piece]:
        for kind, parameter in self.named_parameters(recurse=False):
            target = parameter[:, : self._in_features] if kind == "weight" else parameter
            yield Piece(target, f"{path}.{kind}", tuple(target.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops_for(x.device).linear(x, self.weight, self.bias)

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """[T, out_features] or, where that is faster, float32 [S, T, out_features] whose sum over S it is. With a bias always the
        former: for `RMSNorm.add`."""
        return ops_for(x.device).linear_partial(x, self.weight) if self.bias is None else self(x)


class MergedLinear(nn.Module):
    """Linear layers of the same input as one product, their outputs side by side (q, k, v; gate, up).

    `parts`: the name of each layer in the checkpoint, beside which this one stands, and its number of outputs. `aligned`: each
    part is followed by outputs of 0 (`aligned_size`).
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool, aligned: bool = False) -> None:
        super().__init__()
        self._parts = dict(parts)
        self._part_sizes = [aligned_size(size) if aligned else size for size in parts.values()]
        self.weight = empty_parameter(sum(self._part_sizes), in_features)
        self.bias = empty_parameter(sum(self._part_sizes)) if bias else None
        for parameter in self.parameters(recurse=False):
            for part, size in zip(parameter.split(self._part_sizes), parts.values(), strict=True):
                part[size:].zero_()

    def checkpoint_pieces(self, path: str) -> Iterator[Piece]:
        for kind, parameter in self.named_parameters(recurse=False):
            for (name, rows), part in zip(self._parts.items(), parameter.split(self._part_sizes), strict=True):
                target = part[:rows]
                yield Piece(target, f"{parent_path(path)}.{name}.{kind}", tuple(target.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops_for(x.device).linear(x, self.weight, self.bias)
