"""The contract every attention backend fulfils, and what a step tells it. Backends live beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """One step's layout: the tokens of R requests, one request after another, T in all. Lengths are known on the host too, so
    that no backend has to read the device back. Every query sees the keys of its own request up to its own position."""

    query_lens: np.ndarray  # int64 [R], host: tokens of each request in this step, at least 1
    seq_lens: np.ndarray  # int64 [R], host: tokens of each request once this step is computed
    query_start_loc: torch.Tensor  # int32 [R + 1]: first token of each request in the step
    seq_lens_device: torch.Tensor  # int32 [R]
    block_table: torch.Tensor  # int32 [R, blocks of the longest]: block ids, in order; past a request's end anything valid
    slot_mapping: torch.Tensor  # int64 [T]: where each token's key and value go: block id * block_size + place in it
    block_size: int


class AttentionBackend(Protocol):
    """`kv_cache` is one layer's [2, num_blocks, block_size, KV, D]: keys, then values."""

    name: str

    def plan(self, metadata: AttentionMetadata) -> Any:
        """What can be worked out once for all layers of a step."""
        ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        """Write `key` and `value` [T, KV, D] to the cache, then attend with `query` [T, H, D]. Returns [T, H, D]."""
        ...

    def plan_varlen(self, seqlens: Sequence[int], device: torch.device) -> Any:
        """As `plan`, for attention inside segments of these lengths, without a cache (vision towers)."""
        ...

    def varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any, scale: float) -> torch.Tensor:
        """Every token sees its whole segment. All are [N, H, D]."""
        ...


class PagedAttention:
    """A step's attention as a model's layers see it: the backend, the layers' caches and the plan bound together."""

    def __init__(self, backend: AttentionBackend, kv_caches: Sequence[torch.Tensor], metadata: AttentionMetadata) -> None:
        self._backend = backend
        self._kv_caches = kv_caches
        self._plan = backend.plan(metadata)

    def __call__(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return self._backend.forward(query, key, value, self._kv_caches[layer_index], self._plan, scale)
