"""The two ends of a language model: token ids and pictures to vectors, vectors to logits."""

from __future__ import annotations

import torch
from torch import nn

from mmv1.kernels import ops_for
from mmv1.models.layers.linear import empty_parameter


class TokenEmbedding(nn.Module):
    """`weight` [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)

    def forward(self, input_ids: torch.Tensor, image_rows: torch.Tensor, image_embeddings: torch.Tensor) -> torch.Tensor:
        """See `interface.Model.embed`."""
        return ops_for(input_ids.device).embed(input_ids, self.weight, image_rows, image_embeddings)


class LMHead(nn.Module):
    """Logits over the vocabulary. Tied: the embedding's own parameter, which the checkpoint then need not repeat."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tied_to: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size) if tied_to is None else tied_to.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return ops_for(hidden.device).linear(hidden, self.weight, None)
