"""Compiles every fused kernel for an H100, at a real model's widths: run by test_compile.py in a process of its own.

The operations are called on tensors of the CPU, and where Triton would compile a kernel for the device at hand and launch it, it
is compiled for compute capability 9.0 instead. Prints a line a kernel: name, bytes of shared memory, bytes of local memory.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from mmv1.kernels import fused
from mmv1.kernels.linear import skinny_config, skinny_linear, skinny_partial
from mmv1.kernels.paged_attention import paged_attention
from mmv1.kernels.sampling import gumbel_argmax
from mmv1.kernels.varlen_attention import make_segments, varlen_attention


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of JITFunction.run."""
    bound = dict(zip(kernel.arg_names, args, strict=False))
    bound |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kwargs)
    local = re.findall(r"local .*__local_depot\w*\[(\d+)\]", compiled.asm["ptx"])
    print(kernel.__name__, compiled.metadata.shared, sum(map(int, local)), flush=True)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def main() -> None:
    JITFunction.run = compile_only
    x, weight = random(3, 3584), random(3584)
    fused.rms_norm(x, weight, 1e-6)
    fused.add_rms_norm(x, x, weight, 1e-6)
    fused.add_rms_norm(random(7, 3, 3584, dtype=torch.float32), x, weight, 1e-6)
    vision, vision_weight = random(8, 1152), random(1152)  # of Qwen3-VL's towers
    fused.layer_norm(vision, vision_weight, vision_weight, 1e-6)
    fused.layer_norm(random(2, 4608), random(4608), random(4608), 1e-6)
    fused.add_layer_norm(vision, vision, vision_weight, vision_weight, 1e-6)
    fused.add_layer_norm(random(2, 8, 1152, dtype=torch.float32), vision, vision_weight, vision_weight, 1e-6)
    fused.silu_and_mul(random(3, 2 * 18944))
    fused.quick_gelu(random(8, 5120))
    slots, cache = torch.zeros(3, dtype=torch.int32), random(2, 4, 16, 4, 128)
    for norm in (None, random(128)):
        fused.rotate_and_store(random(3, 36, 128), 4, random(3, 64), random(3, 64), slots, cache, norm, norm, 1e-6)
    angles = random(8, 40, dtype=torch.float32)
    fused.rotate_(random(8, 48, 80)[:, :32], angles, angles)
    fused.embed(slots, random(100, 3584), slots, random(7, 3584))
    fused.embed(slots, random(100, 2048), slots, random(7, 4 * 2048))
    fused.add_interpolated(vision, random(2304, 1152), torch.zeros(8, 4, dtype=torch.int64), torch.ones(8, 4))
    scale = torch.ones(3)
    fused.normalize_patches(random(8, 588, dtype=torch.uint8), torch.arange(2), 4, scale, scale, 592, torch.bfloat16)
    for rows, width in ((4608, 3584), (3584, 18944), (37888, 2048)):
        tokens, matrix = random(3, width), random(rows, width)
        for split in (1, 2):
            skinny_linear(tokens, matrix, random(rows), skinny_config(rows, partial=False)._replace(split_k=split))
        skinny_partial(tokens, matrix, skinny_config(rows, partial=True))
    gumbel_argmax(random(3, 152064), torch.ones(3), torch.zeros(3, dtype=torch.int64))
    compile_experts()
    compile_attention()


def compile_experts() -> None:
    """Of Qwen3-30B-A3B: every tile; where a block takes all tokens, and where they are sorted; in float32 too."""
    for num_experts, top_k in ((128, 8), (512, 10)):
        fused.route(random(3, num_experts), top_k, True)
    gate_up, down = random(128, 2 * 768, 2048), random(128, 2048, 768)
    for tokens in (1, 64, 512, 4096):
        fused.experts(random(tokens, 2048), gate_up, down, random(tokens, 8), torch.zeros(tokens, 8, dtype=torch.int32))
    for tokens in (1, 17):
        weights, ids = random(tokens, 8, dtype=torch.float32), torch.zeros(tokens, 8, dtype=torch.int32)
        fused.experts(random(tokens, 2048, dtype=torch.float32), gate_up[:1].float(), down[:1].float(), weights, ids)


def compile_attention() -> None:
    """Small and large tiles, whole and split; windows and long segments; in float32 too, which needs the most memory."""
    tiles, table = torch.zeros(4, 3, dtype=torch.int32), torch.zeros(3, 7, dtype=torch.int32)
    for head_dim, dtype in ((128, torch.bfloat16), (80, torch.bfloat16), (128, torch.float32)):
        query, cache = random(3, 28, head_dim, dtype=dtype), random(2, 4, 16, 4, head_dim, dtype=dtype)
        for tokens, splits in ((2, 1), (2, 16), (2, 64), (9, 1), (128, 1)):
            paged_attention(query, cache, tiles, table, 0.1, block_size=16, tokens_per_tile=tokens, num_splits=splits)
    for head_dim, dtype in ((80, torch.bfloat16), (72, torch.bfloat16), (128, torch.float32)):
        query, key, value = random(8, 3 * 16, head_dim, dtype=dtype).split(16, dim=1)
        for seqlens in ([8], [80]):
            varlen_attention(query, key, value, torch.from_numpy(make_segments(seqlens, max(seqlens))), 0.1)


if __name__ == "__main__":
    main()
