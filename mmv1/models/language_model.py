"""A language model, with a vision tower before it or without: what every family is put together as.

A model of text alone is one without a tower: the same steps, the same graphs, the same caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mmv1.errors import ConfigError
from mmv1.models.decoder import Decoder, DecoderConfig
from mmv1.models.interface import AttentionLayerSpec, GridTHW, ImageSpan, StepAttention, VarlenAttention
from mmv1.models.layers.embedding import LMHead
from mmv1.models.layers.rotary import RotaryEmbedding
from mmv1.models.layers.vision import VisionConfig

# Where checkpoints keep a part: the layout on the hub, then that of transformers 5's own modules.
_PREFIXES = {"visual.": "model.visual.", "model.": "model.language_model."}


class Tower(Protocol):
    config: VisionConfig
    embedding_width: int  # numbers of a token; a multiple of the language model's width

    def lay_out(self, grids: Sequence[GridTHW], attention: VarlenAttention, num_patches: int | None) -> Any:
        """See `interface.Model.lay_out_images`."""
        ...

    def __call__(self, patches: torch.Tensor, layout: Any, attention: VarlenAttention) -> torch.Tensor:
        """See `interface.Model.encode_images`."""
        ...


def is_tied(*configs: Mapping[str, Any]) -> bool:
    """Either place may say it: transformers 4 wrote it into text_config, 5 writes it outside and reads both."""
    return any(config.get("tie_word_embeddings") for config in configs)


def names_with_tower(name: str) -> tuple[str, ...]:
    """A name as the hub's checkpoints have it, then as transformers 5's modules do."""
    for prefix, other in _PREFIXES.items():
        if name.startswith(prefix):
            return name, other + name.removeprefix(prefix)
    return (name,)


class LanguageModel(nn.Module):
    """See `interface.Model` for what each method means."""

    def __init__(
        self,
        config: DecoderConfig,
        rotary: RotaryEmbedding,
        *,
        tie_word_embeddings: bool,
        visual: Tower | None = None,
        checkpoint_names: Callable[[str], tuple[str, ...]] = lambda name: (name,),
    ) -> None:
        """`checkpoint_names`: what a checkpoint may call the parameter of a name, likeliest first. Raises ConfigError."""
        super().__init__()
        if visual is not None and visual.config.out_hidden_size != config.hidden_size:
            raise ConfigError("config.json: the vision tower's out_hidden_size is not the language model's hidden_size")
        self.visual = visual
        self.model = Decoder(config, rotary)
        tied_to = self.model.embed_tokens if tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, tied_to=tied_to)
        self.checkpoint_names = checkpoint_names
        self.vocab_size = config.vocab_size
        self.num_position_axes = 1 if visual is None else 3
        self.embedding_width = config.hidden_size if visual is None else visual.embedding_width
        self.patch_bytes = 0 if visual is None else visual.config.patch_numbers
        self.spatial_merge_size = 1 if visual is None else visual.config.spatial_merge_size
        self.has_experts = config.experts is not None
        self.attention_layers = [
            AttentionLayerSpec(f"model.layers.{index}.self_attn", config.num_heads, config.num_kv_heads, config.head_dim)
            for index in range(config.num_layers)
        ]

    def prompt_positions(self, prompt_len: int, images: Sequence[ImageSpan]) -> np.ndarray:
        """Text advances all axes by one a token. A picture's tokens share the time of its first one and spread over rows and
        columns; what follows it continues after its longer side (Qwen2-VL, section 2.1)."""
        positions = np.empty((self.num_position_axes, prompt_len), dtype=np.int32)
        token, position = 0, 0  # the first not yet placed, and its position
        for offset, grid_thw in images:
            positions[:, token:offset] = np.arange(position, position + offset - token, dtype=np.int32)
            position += offset - token
            frames, height, width = grid_thw
            height, width = height // self.spatial_merge_size, width // self.spatial_merge_size
            token = offset + frames * height * width
            positions[:, offset:token] = np.indices((frames, height, width), dtype=np.int32).reshape(3, -1) + position
            position += max(height, width)
        positions[:, token:] = np.arange(position, position + prompt_len - token, dtype=np.int32)
        return positions

    def lay_out_images(self, grids: Sequence[GridTHW], attention: VarlenAttention, num_patches: int | None = None) -> Any:
        return self._tower.lay_out(grids, attention, num_patches)

    def encode_images(self, patches: torch.Tensor, layout: Any, attention: VarlenAttention) -> torch.Tensor:
        return self._tower(patches, layout, attention)

    def embed(self, input_ids: torch.Tensor, image_rows: torch.Tensor, image_embeddings: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids, image_rows, image_embeddings)

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        return self.model(inputs, positions, attention)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    @property
    def _tower(self) -> Tower:
        if self.visual is None:
            raise ValueError("a model without a vision tower was given pictures")
        return self.visual
