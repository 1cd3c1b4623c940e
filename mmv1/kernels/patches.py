"""uint8 patches to the numbers a vision tower's first product takes. One program a patch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmv1.kernels.rows import check_rows


def normalize_patches(
    patches: torch.Tensor,
    order: torch.Tensor,
    unit: int,
    mean: torch.Tensor,
    std: torch.Tensor,
    padded_width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_rows(patches, order)
    num_patches, width = patches.shape
    out = torch.empty((num_patches, padded_width), dtype=dtype, device=patches.device)
    _normalize_patches_kernel[(num_patches,)](
        patches, order, mean, std, out, patches.stride(0), unit, width, width // mean.shape[0], padded_width,
        triton.next_power_of_2(padded_width), num_warps=4,
    )  # fmt: skip
    return out


# Where a picture's bytes begin differs from call to call: nothing may be compiled for it.
@triton.jit(do_not_specialize=["patches", "order"])
def _normalize_patches_kernel(
    patches, order, mean, std, out, stride,
    unit: tl.constexpr, width: tl.constexpr, channel_width: tl.constexpr, padded_width: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0)
    source = tl.load(order + patch // unit).to(tl.int64) * unit + patch % unit
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    pixels = tl.load(patches + source * stride + columns, mask=inside, other=0).to(tl.float32)
    channel = columns // channel_width
    centered = pixels - tl.load(mean + channel, mask=inside, other=0.0)
    # The division is rounded as IEEE 754 has it: the results are torch's to the bit. Past a patch's end it is 0 / 1.
    normalized = tl.div_rn(centered, tl.load(std + channel, mask=inside, other=1.0))
    tl.store(out + patch.to(tl.int64) * padded_width + columns, normalized.to(out.dtype.element_ty), mask=columns < padded_width)
