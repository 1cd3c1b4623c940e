"""The floor of a load: the least time the arithmetic and the memory traffic of its requests can take on a device.

Operations and bytes are counted from config.json, bf16 weights and KV; two operations a multiplication. Left out, so that the
real ceiling is lower: attention below the rate of matrix products, traffic of activations, sampling, copies, gaps between steps.

- Vision tower: its matrices on N patches, its mergers on T tokens, the patch embedding folded to one frame, and 4 N L d for the
  attention of each layer, where L is N, or the patches of a window.
- Prompt: 2 P n, and 4 n_q d_h layers (n c + n^2 / 2) for the attention of n new tokens over c that are cached.
- A decode step: all weights read once, of a mixture of experts those that somebody is sent to (by chance: all equally likely),
  and every sequence's KV; or its operations, where they take longer.
- A request: both of the former and its share of its decode steps. One after the other they are the serial floor; overlapped, the
  device is bound by all operations or by the bytes of decoding, whichever is more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmv1.config import read_image_processor_config, read_json, section, text_config, whole_number, whole_numbers
from mmv1.errors import ConfigError

_BYTES = 2  # of a weight, and of a number in the KV cache
_RESERVED_BYTES = 3e9  # beside weights and KV

# As config.json's model_type names them.
_TEXT_MODELS = ("llama", "qwen2", "qwen3", "qwen3_moe")
_SEEING_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class Device:
    """Operations/s and bytes/s as measured with large matrix products and copies, not as advertised; bytes usable."""

    flops: float = 800e12
    bandwidth: float = 3.0e12
    memory: float = 85.5e9 * 0.92


H100 = Device()


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """`num_full`: layers whose attention is over the whole picture; in the others it is over `window` patches."""

    width: int
    num_layers: int
    mlp_width: int
    mlp_matrices: int
    patch_size: int
    out_width: int
    num_full: int
    window: int
    num_mergers: int
    min_pixels: int
    max_pixels: int

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(patches, tokens) of a picture: sides are rounded to whole tokens, and scaled where the area is out of bounds."""
        side = 2 * self.patch_size
        columns, rows = max(1, round(width / side)), max(1, round(height / side))
        if (area := rows * columns * side**2) > self.max_pixels or area < self.min_pixels:
            shrinks = area > self.max_pixels
            scale = math.sqrt((self.max_pixels if shrinks else self.min_pixels) / (width * height))
            rounded = math.floor if shrinks else math.ceil
            columns, rows = max(1, rounded(width * scale / side)), max(1, rounded(height * scale / side))
        return 4 * rows * columns, rows * columns

    @property
    def num_parameters(self) -> int:
        return self.num_layers * (4 * self.width**2 + self.mlp_matrices * self.width * self.mlp_width)

    @property
    def merger_parameters(self) -> int:
        """All mergers together; they work on tokens, each made of four patches."""
        return self.num_mergers * ((4 * self.width) ** 2 + 4 * self.width * self.out_width)

    def flops(self, patches: int, tokens: int) -> float:
        """Of one picture."""
        weights = 2 * self.num_parameters * patches + 2 * self.merger_parameters * tokens
        embedding = 2 * 3 * self.patch_size**2 * self.width * patches
        per_layer = 4 * patches * self.width
        return weights + embedding + per_layer * (self.num_full * patches + (self.num_layers - self.num_full) * self.window)


NO_TOWER = VisionTower(
    width=0, num_layers=0, mlp_width=0, mlp_matrices=0, patch_size=1, out_width=0, num_full=0, window=0, num_mergers=0,
    min_pixels=0, max_pixels=0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """`num_sparse_layers` have, instead of an MLP, `num_experts` of `expert_width`; a token goes through `experts_per_token`."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    num_sparse_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0

    def parameters(self, experts: float) -> float:
        """Of all layers, with as many of each mixture's experts."""
        attention = 2 * self.width * (self.num_heads + self.num_kv_heads) * self.head_dim
        router = self.width * self.num_experts
        sparse = self.num_sparse_layers * (router + experts * 3 * self.width * self.expert_width)
        return self.num_layers * attention + (self.num_layers - self.num_sparse_layers) * 3 * self.width * self.mlp_width + sparse

    @property
    def layer_parameters(self) -> float:
        """Those that one token meets."""
        return self.parameters(self.experts_per_token)

    def read_parameters(self, batch: int) -> float:
        """Those that at least one of `batch` tokens meets."""
        missed = (1 - self.experts_per_token / self.num_experts) ** batch if self.num_experts else 0.0
        return self.parameters(self.num_experts * (1 - missed))

    @property
    def head_parameters(self) -> int:
        return self.width * self.vocab_size

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _BYTES

    def prefill_flops(self, new: float, cached: float = 0) -> float:
        attention = 4 * self.num_heads * self.head_dim * self.num_layers * (new * cached + new * new / 2)
        return 2 * self.layer_parameters * new + attention + 2 * self.head_parameters

    def decode_step(self, batch: int, context: float, shared: float = 0) -> tuple[float, float]:
        """(bytes, operations) of a step of `batch` sequences with `context` tokens each, of which `shared` are read once."""
        kv = (batch * (context - shared) + shared) * self.kv_bytes_per_token
        attention = 4 * self.num_heads * self.head_dim * self.num_layers * context
        operations = 2 * (self.layer_parameters + self.head_parameters) + attention
        return _BYTES * (self.read_parameters(batch) + self.head_parameters) + kv, batch * operations


@dataclass(frozen=True, kw_only=True)
class Request:
    """The mean request of a load. `images`: width and height of each picture. `reuse`: requests that ask about the same pictures,
    the prompt's tokens up to the pictures' end included; `shared_prefix`: tokens before them that all requests have."""

    images: Sequence[tuple[int, int]] = ()
    text_tokens: float = 50
    output_tokens: float = 128
    reuse: float = 1
    shared_prefix: float = 0


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Milliseconds of device time a request takes, and requests/s. `ttft_ms`: of a request by itself; `tpot_ms`: likewise."""

    batch: int
    encode_ms: float
    prefill_ms: float
    decode_ms: float
    serial_rps: float
    ideal_rps: float
    ttft_ms: float
    tpot_ms: float


def read_model(model_dir: Path) -> tuple[LanguageModel, VisionTower]:
    """What the formulas need of config.json. Raises ConfigError for a model they do not know."""
    config = read_json(model_dir / "config.json")
    kind = config.get("model_type")
    if kind in _TEXT_MODELS:
        return _language_model(config), NO_TOWER
    if kind not in _SEEING_MODELS:
        raise ConfigError(f"there are no formulas for the floor of a {kind!r} model")
    model = _language_model(text_config(config))
    return model, _tower(section(config, "vision_config"), model.width, _pixel_bounds(read_image_processor_config(model_dir)))


def _language_model(text: Mapping[str, Any]) -> LanguageModel:
    heads, width = whole_number(text, "num_attention_heads"), whole_number(text, "hidden_size")
    num_layers = whole_number(text, "num_hidden_layers")
    experts: dict[str, int] = {}
    if num_experts := text.get("num_experts") or text.get("num_local_experts"):
        every, dense = whole_number(text, "decoder_sparse_step", 1), whole_numbers(text, "mlp_only_layers", ())
        experts = {
            "num_sparse_layers": sum((i + 1) % every == 0 and i not in dense for i in range(num_layers)),
            "num_experts": num_experts,
            "experts_per_token": whole_number(text, "num_experts_per_tok"),
            "expert_width": whole_number(text, "moe_intermediate_size"),
        }
    return LanguageModel(
        width=width,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=whole_number(text, "num_key_value_heads", heads),
        head_dim=whole_number(text, "head_dim", width // heads),
        mlp_width=whole_number(text, "intermediate_size"),
        vocab_size=whole_number(text, "vocab_size"),
        **experts,
    )


def _tower(vision: Mapping[str, Any], out_width: int, pixel_bounds: tuple[int, int]) -> VisionTower:
    """The oldest family spells its widths otherwise than those after it; one family has windows, and a gate in its MLP."""
    num_layers, patch_size = whole_number(vision, "depth"), whole_number(vision, "patch_size")
    is_windowed = "window_size" in vision
    width = whole_number(vision, "embed_dim" if "embed_dim" in vision else "hidden_size")
    least, most = pixel_bounds
    return VisionTower(
        width=width,
        num_layers=num_layers,
        mlp_width=whole_number(vision, "intermediate_size", width * whole_number(vision, "mlp_ratio", 4)),
        mlp_matrices=3 if is_windowed else 2,
        patch_size=patch_size,
        out_width=out_width,
        num_full=len(whole_numbers(vision, "fullatt_block_indexes")) if is_windowed else num_layers,
        window=(whole_number(vision, "window_size") // patch_size) ** 2 if is_windowed else 0,
        num_mergers=1 + len(whole_numbers(vision, "deepstack_visual_indexes", ())),
        min_pixels=least,
        max_pixels=most,
    )


def _pixel_bounds(processor: Mapping[str, Any]) -> tuple[int, int]:
    """(fewest, most) pixels of a resized picture, in either of transformers' spellings."""
    size = section(processor, "size")
    least = whole_number(processor, "min_pixels", whole_number(size, "shortest_edge", 56 * 56))
    return least, whole_number(processor, "max_pixels", whole_number(size, "longest_edge", 12_845_056))


def floor_of(
    model: LanguageModel,
    tower: VisionTower,
    request: Request,
    *,
    device: Device = H100,
    max_batch: int = 256,
    shares_kv_reads: bool = True,
) -> Floor:
    """`max_batch`: most requests at a time, further limited by the KV the device holds. `shares_kv_reads`: KV that sequences have
    in common is read once for all of them in a decode step (cascade attention)."""
    grids = [tower.grid(*image) for image in request.images]
    picture_tokens = sum(tokens for _, tokens in grids)
    picture_flops = sum(tower.flops(*grid) for grid in grids)
    prefix, reuse, output = request.shared_prefix, request.reuse, request.output_tokens
    own = picture_tokens + request.text_tokens
    first_flops = model.prefill_flops(own, prefix)
    later_flops = model.prefill_flops(request.text_tokens, prefix + picture_tokens)
    prefill = (first_flops + (reuse - 1) * later_flops) / reuse
    kv_tokens = picture_tokens / reuse + request.text_tokens + output
    parameters = model.parameters(model.num_experts) + 2 * model.head_parameters + tower.num_parameters
    free = device.memory - _BYTES * parameters - _RESERVED_BYTES - prefix * model.kv_bytes_per_token
    batch = max(1, min(max_batch, int(free / (kv_tokens * model.kv_bytes_per_token))))
    step_bytes, step_flops = model.decode_step(batch, prefix + own + output / 2, prefix if shares_kv_reads else 0)
    if shares_kv_reads:  # groups of `reuse` sequences read their pictures' KV once
        step_bytes -= batch * picture_tokens * model.kv_bytes_per_token * (1 - 1 / reuse)
    encode_s, prefill_s = picture_flops / reuse / device.flops, prefill / device.flops
    decode_s = max(step_bytes / device.bandwidth, step_flops / device.flops) * output / batch
    compute_s = encode_s + prefill_s + step_flops * output / batch / device.flops
    alone_bytes, alone_flops = model.decode_step(1, prefix + own + output / 2)
    return Floor(
        batch=batch,
        encode_ms=1000 * encode_s,
        prefill_ms=1000 * prefill_s,
        decode_ms=1000 * decode_s,
        serial_rps=1 / (encode_s + prefill_s + decode_s),
        ideal_rps=1 / max(compute_s, step_bytes * output / batch / device.bandwidth),
        ttft_ms=1000 * (picture_flops + first_flops) / device.flops,
        tpot_ms=1000 * max(alone_bytes / device.bandwidth, alone_flops / device.flops),
    )
