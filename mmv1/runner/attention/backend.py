"""The contract every attention backend fulfils, and what a step tells it. Backends live beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mmv1.kernels import ops_for
from mmv1.models.interface import SegmentRoom
from mmv1.models.layers.rotary import Rope


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """One step's layout: the tokens of R requests, one request after another, T in all. Lengths are known on the host too, so
    that no backend has to read the device back. Every query sees the keys of its own request up to its own position."""

    query_lens: np.ndarray  # int64 [R], host: tokens of each request in this step, at least 1
    seq_lens: np.ndarray  # int64 [R], host: tokens of each request once this step is computed
    query_start_loc: torch.Tensor  # int32 [R + 1]: first token of each request in the step
    seq_lens_device: torch.Tensor  # int32 [R]
    rows: torch.Tensor  # int32 [R]: each request's row in block_table
    host_rows: np.ndarray  # int64 [R], host: the same
    block_table: torch.Tensor  # int32 [rows, blocks of the longest]: block ids, in order; past a request's end anything valid
    block_size: int


class RecordedLayout(Protocol):
    """A step's layout for a recorded launch, which reads it from the same memory each time: `num_numbers` int32 numbers."""

    num_numbers: int

    def fits(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> bool:
        """Whether a step with these tokens, and these together with those before it, int64 [R] each, has room and is not better
        launched by itself."""
        ...

    def write(self, numbers: np.ndarray, rows: np.ndarray, query_lens: np.ndarray, computed: np.ndarray) -> None:
        """Fill `numbers` int32 [num_numbers] with a step of R requests: row in the block table, tokens in the step, tokens
        computed before it, int64 [R] each."""
        ...

    def plan(self, numbers: torch.Tensor) -> Any:
        """What `AttentionBackend.forward` takes, over the numbers on the device. What it launches is recorded too."""
        ...


class AttentionBackend(Protocol):
    """`kv_cache` is one layer's [2, num_blocks, block_size, KV, D]: keys, then values. What lies in slots that no token of a
    request has written, NaN included, never reaches its result."""

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
        """Attend with `query` [T, H, D]. `key` and `value` [T, KV, D], the step's own, are in the cache already. Returns
        [T, H, D]."""
        ...

    def layout(
        self, most_requests: int, block_table: torch.Tensor, block_size: int, output: torch.Tensor
    ) -> RecordedLayout | None:
        """For recorded steps of as many tokens as `output` [T, H, D] has room for, which is where their results go: rows of
        tokens that belong to no request stay as they are. None: this backend's steps cannot be recorded."""
        ...

    def plan_varlen(self, seqlens: Sequence[int], device: torch.device, room: SegmentRoom | None = None) -> Any:
        """As `plan`, for attention inside segments of these lengths, without a cache (vision towers)."""
        ...

    def varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Any, scale: float) -> torch.Tensor:
        """Every token sees its whole segment. All are [N, H, D]; the inputs may be views of one product."""
        ...


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class PagedAttention:
    """A step's attention as a model's layers see it: the backend, its plan, the layers' caches and the places of the step's
    tokens in them (`slot_mapping` int32 [T]: block id * block_size + place in it) bound together."""

    def __init__(
        self, backend: AttentionBackend, plan: Any, kv_caches: Sequence[torch.Tensor], slot_mapping: torch.Tensor
    ) -> None:
        self._backend = backend
        self._plan = plan
        self._kv_caches = kv_caches
        self._slot_mapping = slot_mapping
        self._ops = ops_for(slot_mapping.device)

    def __call__(
        self,
        layer_index: int,
        qkv: torch.Tensor,
        num_kv_heads: int,
        rope: Rope,
        scale: float,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """`qkv` [T, H + 2 KV, D], not rotated yet; `q_norm` and `k_norm` [D]: weights of a norm per head before that. Returns
        [T, H, D]."""
        kv_cache = self._kv_caches[layer_index]
        query, key, value = self._ops.rotate_and_store(
            qkv, num_kv_heads, rope.cos, rope.sin, self._slot_mapping, kv_cache, q_norm, k_norm, eps
        )
        return self._backend.forward(query, key, value, kv_cache, self._plan, scale)
