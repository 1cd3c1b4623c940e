"""The KV cache's memory. Which block belongs to whom is the ledger's knowledge (manager.py); here are only numbers in blocks."""

from __future__ import annotations

import torch

from mmv1.step import KVCacheSpec


def allocate_kv_caches(
    spec: KVCacheSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """One [2, num_blocks, block_size, kv_heads, head_dim] for each of the group's layers: keys, then values.

    Zeroed, since a masked key still takes part in a product: whatever lies in a block must be finite. Block 0 is the null
    block, which the ledger gives to nobody and padding may point at. On a CPU the pages are touched when first written.
    """
    shape = (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in spec.layer_names]
