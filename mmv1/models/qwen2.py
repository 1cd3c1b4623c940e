"""The Qwen2 language model: the trunk that Qwen2.5-VL shares with the text-only models of its generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmv1.config import positive_number, section, whole_number, whole_numbers
from mmv1.errors import ConfigError
from mmv1.models.interface import StepAttention
from mmv1.models.layers.attention import SelfAttention
from mmv1.models.layers.embedding import TokenEmbedding
from mmv1.models.layers.mlp import GatedMLP
from mmv1.models.layers.norm import RMSNorm
from mmv1.models.layers.rotary import MRotaryEmbedding, Rope


@dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]

    @classmethod
    def from_hf(cls, text: Mapping[str, Any]) -> Qwen2Config:
        """`text`: the language model's part of config.json, in either dialect: rope_theta and rope_scaling (transformers 4),
        or rope_parameters with both (5). Raises ConfigError for what this trunk does not do."""
        if text.get("use_sliding_window"):
            raise ConfigError("use_sliding_window is set in config.json, and sliding windows are not supported for this model")
        if text.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act '{text['hidden_act']}' is not supported for this model, only 'silu'")
        rope = section(text, "rope_parameters") or section(text, "rope_scaling")
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type not in ("default", "mrope"):
            raise ConfigError(f"rope type '{rope_type}' is not supported for this model, only 'default' and 'mrope'")
        num_heads = whole_number(text, "num_attention_heads")
        num_kv_heads = whole_number(text, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(f"num_attention_heads {num_heads} of config.json is no multiple of its num_key_value_heads")
        hidden_size = whole_number(text, "hidden_size")
        head_dim = whole_number(text, "head_dim", hidden_size // num_heads)
        sections = whole_numbers(rope, "mrope_section", (16, 24, 24))
        if 2 * sum(sections) != head_dim:
            raise ConfigError(f"mrope_section {list(sections)} of config.json does not add up to half of head_dim {head_dim}")
        return cls(
            vocab_size=whole_number(text, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=whole_number(text, "intermediate_size"),
            num_layers=whole_number(text, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive_number(text, "rms_norm_eps", 1e-5),
            rope_theta=positive_number(rope, "rope_theta", positive_number(text, "rope_theta", 1_000_000.0)),
            mrope_section=sections,
        )


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: Qwen2Config, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(
            layer_index, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, qkv_bias=True
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, rope: Rope, attention: StepAttention, next_norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` is the residual stream as this layer's first norm gives it; returns what `next_norm` gives, and the stream.
        So each addition and the norm after it are one operation."""
        update = self.self_attn(hidden, rope, attention)
        hidden, residual = self.post_attention_layernorm.add(update, residual)
        return next_norm.add(self.mlp(hidden), residual)


class Qwen2Model(nn.Module):
    """Embedding, decoder layers, last norm. `hidden` is [T, hidden_size] throughout."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MRotaryEmbedding(config.head_dim, config.rope_theta, config.mrope_section)

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        rope = self.rotary_emb(positions, embedded.dtype)
        norms: list[Any] = [*(layer.input_layernorm for layer in self.layers), self.norm]
        hidden, residual = norms[0](embedded), embedded
        for layer, next_norm in zip(self.layers, norms[1:], strict=True):
            hidden, residual = layer(hidden, residual, rope, attention, next_norm)
        return hidden
