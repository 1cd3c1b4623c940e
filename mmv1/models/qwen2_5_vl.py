"""Qwen2.5-VL: the vision tower and the Qwen2 language model joined, and the family's M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmv1.config import Normalization, image_normalization, read_image_processor_config, section, text_config
from mmv1.errors import ConfigError
from mmv1.models.interface import AttentionLayerSpec, GridTHW, ImageSpan, StepAttention, VarlenAttention
from mmv1.models.layers.embedding import LMHead
from mmv1.models.qwen2 import Qwen2Config, Qwen2Model
from mmv1.models.qwen2_5_vision import TowerLayout, VisionConfig, VisionTower

# Where checkpoints keep a part: the layout on the hub, then that of transformers 5's own modules.
_CHECKPOINT_PREFIXES = {"visual.": "model.visual.", "model.": "model.language_model."}


class Qwen2_5_VL(nn.Module):
    """See `interface.Model` for what each method means."""

    num_position_axes = 3

    def __init__(self, text: Qwen2Config, vision: VisionConfig, scale: Normalization, *, tie_word_embeddings: bool) -> None:
        super().__init__()
        if vision.out_hidden_size != text.hidden_size:
            raise ConfigError("config.json: the vision tower's out_hidden_size is not the language model's hidden_size")
        self.visual = VisionTower(vision, scale)
        self.model = Qwen2Model(text)
        tied_to = self.model.embed_tokens if tie_word_embeddings else None
        self.lm_head = LMHead(text.vocab_size, text.hidden_size, tied_to=tied_to)
        self.vocab_size = text.vocab_size
        self.embedding_width = text.hidden_size
        self.patch_bytes = vision.patch_numbers
        self.spatial_merge_size = vision.spatial_merge_size
        self.attention_layers = [
            AttentionLayerSpec(f"model.layers.{index}.self_attn", text.num_heads, text.num_kv_heads, text.head_dim)
            for index in range(text.num_layers)
        ]

    @classmethod
    def from_model_dir(cls, hf_config: Mapping[str, Any], model_dir: Path) -> Qwen2_5_VL:
        """Modules with memory for their weights, not yet filled. Raises ConfigError."""
        text = text_config(dict(hf_config))
        text_part, vision_part = Qwen2Config.from_hf(text), VisionConfig.from_hf(section(hf_config, "vision_config"))
        # Either place may say it: transformers 4 wrote it into text_config, 5 writes it outside and reads both.
        tied = bool(hf_config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        scale = image_normalization(read_image_processor_config(model_dir))
        return cls(text_part, vision_part, scale, tie_word_embeddings=tied)

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        for prefix, other in _CHECKPOINT_PREFIXES.items():
            if name.startswith(prefix):
                return name, other + name.removeprefix(prefix)
        return (name,)

    def prompt_positions(self, prompt_len: int, images: Sequence[ImageSpan]) -> np.ndarray:
        """Text advances all three axes by one a token. A picture's tokens share the time of its first one and spread over
        rows and columns; what follows it continues after its longer side (Qwen2-VL, section 2.1)."""
        positions = np.empty((3, prompt_len), dtype=np.int32)
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

    def lay_out_images(
        self, grids: Sequence[GridTHW], attention: VarlenAttention, num_patches: int | None = None
    ) -> TowerLayout | None:
        return self.visual.lay_out(grids, attention, num_patches)

    def encode_images(self, patches: torch.Tensor, layout: TowerLayout, attention: VarlenAttention) -> torch.Tensor:
        return self.visual(patches, layout, attention)

    def embed(self, input_ids: torch.Tensor, image_rows: torch.Tensor, image_embeddings: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids, image_rows, image_embeddings)

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        return self.model(inputs, positions, attention)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)
