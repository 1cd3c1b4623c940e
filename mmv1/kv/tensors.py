"""The KV cache's memory. Which block belongs to whom is the ledger's knowledge (manager.py); here are only numbers in blocks."""

from __future__ import annotations

import math

import numpy as np
import torch

from mmv1.step import KVCacheSpec


def allocate_kv_caches(
    spec: KVCacheSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """One [2, num_blocks, block_size, kv_heads, head_dim] for each of the group's layers: keys, then values.

    Zeroed, so that whatever lies in a block is finite: our backends read no masked key, but one of a package may multiply it by
    0. Block 0 is the null block, which the ledger gives to nobody and padding may point at. On a CPU the pages are touched when
    first written: the kernel's own zeroes, which numpy asks for and torch.zeros writes over.
    """
    shape = (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    if device.type != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in spec.layer_names]
    num_bytes = math.prod(shape) * dtype.itemsize
    return [torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape) for _ in spec.layer_names]
