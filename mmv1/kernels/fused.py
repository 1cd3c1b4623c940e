"""The operations of `plain.py` as Triton kernels, under the same names, one file for each family.

Numbers are rounded to the tensors' dtype where a chain of separate torch operations would round them, as transformers' does, and
are float32 between. Nothing that changes from step to step is compiled in: kernels are compiled once for a model's widths.
"""

from __future__ import annotations

from mmv1.kernels.activation import quick_gelu, silu_and_mul
from mmv1.kernels.embedding import add_interpolated, embed
from mmv1.kernels.linear import linear, linear_partial
from mmv1.kernels.moe import experts, route
from mmv1.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from mmv1.kernels.patches import normalize_patches
from mmv1.kernels.rotary import rotate_, rotate_and_store

__all__ = [
    "add_interpolated", "add_layer_norm", "add_rms_norm", "embed", "experts", "layer_norm", "linear", "linear_partial",
    "normalize_patches", "quick_gelu", "rms_norm", "rotate_", "rotate_and_store", "route", "silu_and_mul",
]  # fmt: skip
