"""FlashAttention, where it is installed: prompts, mixed steps and long segments; our own kernels do the rest (triton.py).

Either flash-attn-4 (`flash_attn.cute`, compiled at first use) or FlashAttention 3 (`flash_attn_interface`). Both import slowly:
nothing is imported before `load`, which the first call does if nobody has before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from mmv1.errors import ConfigError
from mmv1.models.interface import SegmentRoom
from mmv1.runner.attention.backend import AttentionMetadata, RecordedLayout
from mmv1.runner.attention.triton import SegmentPlan, TritonBackend

# Blocks of more tokens may be as long as a tile of keys, which the package then reads whole, with what nobody has written in it:
# a NaN there would reach the result. Those go to our kernels.
_MOST_BLOCK_TOKENS = 64


class _PagedPlan(NamedTuple):
    query_start_loc: torch.Tensor  # int32 [R + 1]
    seq_lens: torch.Tensor  # int32 [R]
    page_table: torch.Tensor  # int32 [R, blocks of the longest]
    max_query_len: int
    output: torch.Tensor | None = None  # [T, H, D], where the result goes; None: into memory of its own


class FlashFunctions(NamedTuple):
    """What both packages are called through."""

    paged: Callable[[torch.Tensor, torch.Tensor, _PagedPlan, float], torch.Tensor]  # query, kv_cache, plan, scale
    can_be_recorded: bool  # `paged`: its grid depends on the tensors' shapes alone, and it writes where it is told
    segments: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SegmentPlan, float], torch.Tensor]  # query, key, value, ...


def is_installed() -> bool:
    """Whether a package is there; imports neither."""
    return _has("flash_attn.cute") or _has("flash_attn_interface")


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a module inside a package that is not there
        return False


@cache
def load() -> FlashFunctions:
    """Import the package (seconds). Raises ConfigError when there is none."""
    if _has("flash_attn.cute"):
        return _load_cute()
    if _has("flash_attn_interface"):
        return _load_interface()
    raise ConfigError("the attention backend 'flash' needs the package flash-attn-4")


def _load_cute() -> FlashFunctions:
    from flash_attn.cute import flash_attn_varlen_func, interface

    # This one can write to memory that is there, which a recording needs. It is no promise of the package's.
    into: Any = getattr(interface, "_flash_attn_fwd", None)
    can_be_recorded = into is not None and "out" in signature(into).parameters

    def paged(query: torch.Tensor, kv_cache: torch.Tensor, plan: _PagedPlan, scale: float) -> torch.Tensor:
        function = partial(into, out=plan.output) if can_be_recorded else flash_attn_varlen_func
        # The longest query is not said: whether it is short would make two kernels of one, and the second while requests wait.
        return _first(function(
            query, kv_cache[0], kv_cache[1], cu_seqlens_q=plan.query_start_loc, seqused_k=plan.seq_lens,
            page_table=plan.page_table, softmax_scale=scale, causal=True, num_splits=1,
        ))  # fmt: skip

    def segments(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: SegmentPlan, scale: float
    ) -> torch.Tensor:
        return _first(flash_attn_varlen_func(
            query, key, value, cu_seqlens_q=plan.cu_seqlens, cu_seqlens_k=plan.cu_seqlens, max_seqlen_q=plan.longest,
            max_seqlen_k=plan.longest, softmax_scale=scale,
        ))  # fmt: skip

    return FlashFunctions(paged, can_be_recorded, segments)


def _load_interface() -> FlashFunctions:
    from flash_attn_interface import flash_attn_varlen_func, flash_attn_with_kvcache

    def paged(query: torch.Tensor, kv_cache: torch.Tensor, plan: _PagedPlan, scale: float) -> torch.Tensor:
        return _first(flash_attn_with_kvcache(
            query, kv_cache[0], kv_cache[1], cache_seqlens=plan.seq_lens, page_table=plan.page_table,
            cu_seqlens_q=plan.query_start_loc, max_seqlen_q=plan.max_query_len, softmax_scale=scale, causal=True,
        ))  # fmt: skip

    def segments(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: SegmentPlan, scale: float
    ) -> torch.Tensor:
        return _first(flash_attn_varlen_func(
            query, key, value, plan.cu_seqlens, plan.cu_seqlens, plan.longest, plan.longest, softmax_scale=scale
        ))  # fmt: skip

    return FlashFunctions(paged, False, segments)


def _first(result: Any) -> torch.Tensor:
    """Versions differ in whether the sums come with the output."""
    return cast(torch.Tensor, result[0] if isinstance(result, tuple) else result)


class FlashLayout:
    """A recorded step of at most `most_requests`; the rest of them have no tokens."""

    def __init__(self, most_requests: int, block_table: torch.Tensor, output: torch.Tensor) -> None:
        self.num_numbers = 3 * most_requests + 1
        self._most_requests = most_requests
        self._block_table = block_table
        self._output = output

    def fits(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> bool:
        return len(query_lens) <= self._most_requests

    def write(self, numbers: np.ndarray, rows: np.ndarray, query_lens: np.ndarray, computed: np.ndarray) -> None:
        starts, seq_lens, table_rows = np.split(numbers, [self._most_requests + 1, 2 * self._most_requests + 1])
        ends, given = np.cumsum(query_lens), len(rows)
        starts[0], starts[1 : given + 1], starts[given + 1 :] = 0, ends, ends[-1]
        seq_lens[:given], seq_lens[given:] = computed + query_lens, 0
        table_rows[:given], table_rows[given:] = rows, 0

    def plan(self, numbers: torch.Tensor) -> _PagedPlan:
        starts, seq_lens, rows = numbers.split([self._most_requests + 1, self._most_requests, self._most_requests])
        return _PagedPlan(starts, seq_lens, self._block_table.index_select(0, rows), len(self._output), self._output)


class FlashBackend:
    """bfloat16 and float16 on Hopper and later. It splits no request's keys there: steps of single tokens, and whatever comes as
    a TilePlan, go to our kernel, and so do windows, which it is slow at."""

    name = "flash"

    def __init__(self) -> None:
        self._triton = TritonBackend()

    def plan(self, metadata: AttentionMetadata) -> Any:
        max_query_len = int(metadata.query_lens.max())
        if max_query_len == 1 or metadata.block_size > _MOST_BLOCK_TOKENS:
            return self._triton.plan(metadata)
        num_blocks = -(-int(metadata.seq_lens.max()) // metadata.block_size)
        page_table = metadata.block_table[:, :num_blocks].index_select(0, metadata.rows)
        return _PagedPlan(metadata.query_start_loc, metadata.seq_lens_device, page_table, max_query_len)

    def layout(
        self, most_requests: int, block_table: torch.Tensor, block_size: int, output: torch.Tensor
    ) -> RecordedLayout | None:
        if block_size > _MOST_BLOCK_TOKENS:
            return self._triton.layout(most_requests, block_table, block_size, output)
        return FlashLayout(most_requests, block_table, output) if load().can_be_recorded else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        if isinstance(plan, _PagedPlan):
            return load().paged(query, kv_cache, plan, scale)
        return self._triton.forward(query, key, value, kv_cache, plan, scale)

    def plan_varlen(self, seqlens: Sequence[int], device: torch.device, room: SegmentRoom | None = None) -> SegmentPlan:
        return self._triton.plan_varlen(seqlens, device, room)

    def varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: SegmentPlan, scale: float
    ) -> torch.Tensor:
        if plan.cu_seqlens is None or query.shape[-1] % 8:  # it reads heads 16 bytes at a time
            return self._triton.varlen(query, key, value, plan, scale)
        return load().segments(query, key, value, plan, scale)
