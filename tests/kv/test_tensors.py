"""The KV cache's memory: shapes, zeroes, and no page of it touched before something is written there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmv1.kv.tensors import allocate_kv_caches
from mmv1.step import KVCacheSpec

CPU = torch.device("cpu")


def spec(num_layers: int) -> KVCacheSpec:
    return KVCacheSpec(layer_names=tuple(f"layer{i}" for i in range(num_layers)), num_kv_heads=2, head_dim=8, dtype_bytes=4)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_has_its_own_zeroed_blocks(dtype: torch.dtype) -> None:
    first, second = allocate_kv_caches(spec(2), 5, 4, dtype, CPU)
    assert first.shape == second.shape == (2, 5, 4, 2, 8)
    assert first.dtype == dtype
    assert not first.any() and not second.any()
    first[1, 4, 3] = 1.0
    assert first.any() and not second.any()


def test_a_large_cache_takes_no_memory_until_it_is_written() -> None:
    before = resident_bytes()
    (cache,) = allocate_kv_caches(spec(1), 1 << 17, 16, torch.float32, CPU)  # 256 MiB
    assert cache.numel() * 4 == 256 << 20
    assert resident_bytes() - before < 64 << 20
