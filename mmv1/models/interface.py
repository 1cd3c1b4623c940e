"""What the runner asks of a model family (`Model`), and what a model is handed by the runner (attention).

models/ is a leaf: it knows neither requests, blocks nor caches. Attention comes in as an object; which keys a token sees, and
where they lie, is that object's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mmv1.models.layers.rotary import Rope

GridTHW = tuple[int, int, int]  # frames, rows, columns, in patches


class ImageSpan(NamedTuple):
    """A picture's place in a prompt: its first token, and its grid."""

    offset: int
    grid_thw: GridTHW


class AttentionLayerSpec(NamedTuple):
    """What the KV cache must hold for one layer, in the order of the layers."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


class StepAttention(Protocol):
    """Causal attention of one step's tokens over the KV cache; `layer_index` chooses the layer's cache."""

    def __call__(
        self,
        layer_index: int,
        qkv: torch.Tensor,
        num_kv_heads: int,
        rope: Rope,
        scale: float,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """`qkv` [T, H + 2 KV, D]: queries, keys and values as projected. Normalise each head of queries and keys (weights [D];
        None: not), rotate them, store keys and values, attend. Returns [T, H, D]."""
        ...


class SegmentRoom(NamedTuple):
    """What a plan is padded to."""

    num_segments: int
    longest: int  # tokens of a segment, and of all of them


class VarlenAttention(Protocol):
    """Attention without a cache or a causal order, inside each segment of a packed sequence (vision towers)."""

    def plan_varlen(self, seqlens: Sequence[int], device: torch.device, room: SegmentRoom | None = None) -> Any:
        """What can be worked out once for all layers, from the segments' lengths in order (none of them 0). With `room`: a tuple
        whose tensors have the same shapes whatever the lengths, so that a recording can be given others; tokens in no segment
        have an undefined result."""
        ...

    def varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any, scale: float) -> torch.Tensor:
        """`query`, `key` and `value` are [N, H, D]; N is the sum of the planned lengths. Returns [N, H, D]."""
        ...


class Model(Protocol):
    """A model family, loaded. Built from config.json by its class; `registry.load_model` makes one."""

    vocab_size: int
    num_position_axes: int  # rows of `positions`: 3 for M-RoPE, 1 for plain RoPE
    attention_layers: list[AttentionLayerSpec]
    embedding_width: int  # numbers in one picture token's embedding; a multiple of the hidden size
    patch_bytes: int  # of one patch as the pixel slab holds it; 0 for a model without pictures
    spatial_merge_size: int  # patches per picture token, along one side
    has_experts: bool  # which plain torch computes by waiting for the device

    def prompt_positions(self, prompt_len: int, images: Sequence[ImageSpan]) -> np.ndarray:
        """Positions of a prompt's tokens, int32 [num_position_axes, prompt_len]. A later token's position follows its
        predecessor's by one on every axis, after the prompt's largest."""
        ...

    def lay_out_images(
        self, grids: Sequence[GridTHW], attention: VarlenAttention, num_patches: int | None = None
    ) -> tuple[Any, ...] | None:
        """What `encode_images` must know of pictures with these grids. With `num_patches`: padded to as many, in tensors of the
        same shapes whatever the pictures; None when these do not fit."""
        ...

    def encode_images(self, patches: torch.Tensor, layout: Any, attention: VarlenAttention) -> torch.Tensor:
        """Embeddings of several pictures, one after another: [sum of their tokens, embedding_width].

        `patches` is uint8 [sum of patches, patch_bytes], in the order and layout of the pixel slab. Where it is padded, so is
        the result."""
        ...

    def embed(self, input_ids: torch.Tensor, image_rows: torch.Tensor, image_embeddings: torch.Tensor) -> torch.Tensor:
        """The input of `forward` for tokens [T]: where `image_rows` int32 [T] is not -1, that row of `image_embeddings`
        [any, embedding_width] instead of the token's embedding. What it returns only `forward` need understand."""
        ...

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """Hidden states [T, hidden] for `inputs` of `embed` and `positions` int32 [num_position_axes, T]."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, vocab_size], in the model's dtype."""
        ...
