"""The language model that all families share: embedding, decoder layers, last norm. What they differ in is its config."""

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
from mmv1.models.layers.moe import ExpertsConfig, MixtureOfExperts
from mmv1.models.layers.norm import RMSNorm
from mmv1.models.layers.rotary import Rope, RotaryEmbedding


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False  # of queries and keys
    experts: ExpertsConfig | None = None
    sparse_layers: frozenset[int] = frozenset()  # those whose feed-forward part is a mixture of experts

    @classmethod
    def from_hf(cls, text: Mapping[str, Any], *, rms_norm_eps: float = 1e-6, **family: Any) -> DecoderConfig:
        """`text`: the language model's part of config.json, in either dialect of transformers; `rms_norm_eps`: where it does not
        say; `family`: what it never says. Raises ConfigError for what this decoder does not do."""
        if text.get("use_sliding_window") or set(text.get("layer_types") or ()) - {"full_attention"}:
            raise ConfigError("use_sliding_window is set in config.json, and sliding windows are not supported for this model")
        if text.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act '{text['hidden_act']}' is not supported for this model, only 'silu'")
        num_heads = whole_number(text, "num_attention_heads")
        num_kv_heads = whole_number(text, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(f"num_attention_heads {num_heads} of config.json is no multiple of its num_key_value_heads")
        hidden_size = whole_number(text, "hidden_size")
        return cls(
            vocab_size=whole_number(text, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=whole_number(text, "intermediate_size"),
            num_layers=whole_number(text, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=whole_number(text, "head_dim", hidden_size // num_heads),
            rms_norm_eps=positive_number(text, "rms_norm_eps", rms_norm_eps),
            **family,
        )


def rope_settings(text: Mapping[str, Any], *, types: tuple[str, ...], theta: float) -> tuple[str, float, dict[str, Any]]:
    """(type, theta, all settings) of a model's rotary embedding in either dialect: rope_theta and rope_scaling (transformers 4),
    or rope_parameters with both (5). Raises ConfigError for a type that is not among `types`."""
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in types:
        known = " and ".join(f"'{name}'" for name in types)
        raise ConfigError(f"rope type '{rope_type}' is not supported for this model, only {known}")
    return rope_type, positive_number(rope, "rope_theta", positive_number(text, "rope_theta", theta)), rope


def mrope_sections(rope: Mapping[str, Any], default: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    """How many frequencies time, height and width have. Raises ConfigError."""
    sections = whole_numbers(rope, "mrope_section", default)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise ConfigError(f"mrope_section {list(sections)} of config.json does not add up to half of head_dim {head_dim}")
    return sections


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(
            layer_index, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            qkv_bias=config.qkv_bias, o_bias=config.o_bias, head_norm_eps=config.rms_norm_eps if config.head_norm else None,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.experts is not None and layer_index in config.sparse_layers:
            self.mlp = MixtureOfExperts(config.hidden_size, config.experts)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, rope: Rope, attention: StepAttention, next_norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` is the residual stream as this layer's first norm gives it; returns what `next_norm` gives, and the stream.
        So each addition and the norm after it are one operation."""
        update = self.self_attn(hidden, rope, attention)
        hidden, residual = self.post_attention_layernorm.add(update, residual)
        return next_norm.add(self.mlp(hidden), residual)


class Decoder(nn.Module):
    """`hidden` is [T, hidden_size] throughout."""

    def __init__(self, config: DecoderConfig, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary
        self._hidden_size = config.hidden_size

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """`inputs` [T, levels * hidden_size]: the first level is embedded tokens and pictures; each further one is added to the
        residual stream after one of the first layers (DeepStack; Meng et al., 2024)."""
        embedded, *levels = inputs.split(self._hidden_size, dim=1)
        rope = self.rotary_emb(positions, embedded.dtype)
        norms: list[Any] = [*(layer.input_layernorm for layer in self.layers), self.norm]
        hidden, residual = norms[0](embedded), embedded
        for index, (layer, next_norm) in enumerate(zip(self.layers, norms[1:], strict=True)):
            hidden, residual = layer(hidden, residual, rope, attention, next_norm)
            if index < len(levels):
                hidden, residual = next_norm.add(levels[index], residual)
        return hidden
