"""The reference backend: torch's scaled_dot_product_attention, on any device.

Requests with one token in the step (decodes) are gathered and padded into a few batched calls, grouped by length so that at
most half of a group is padding. Padding repeats a request's own first key: nothing else in the cache is read. Longer chunks run
one by one. Grouped-query heads share their key through a stride-0 view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from mmv1.models.interface import SegmentRoom
from mmv1.runner.attention.backend import AttentionMetadata

_QUERY_TILE = 64


class _Decodes(NamedTuple):
    """Requests with one token each, of similar length. S: the padded length in tokens."""

    tokens: torch.Tensor | None  # int64 [R]: their places in the step; None: all of it, in order
    slots: torch.Tensor  # int32 [R * S]: where their keys lie
    mask: torch.Tensor  # bool [R, 1, 1, S]: False where padded


class _Chunk(NamedTuple):
    """One request with several tokens at [start, stop) of the step."""

    start: int
    stop: int
    blocks: torch.Tensor | None  # int32 [blocks]; None: nothing before the chunk, its own keys are all there is
    seq_len: int
    mask: torch.Tensor | None  # bool [stop - start, or one more, seq_len]; None: plainly causal


class _StepPlan(NamedTuple):
    decodes: list[_Decodes]
    chunks: list[_Chunk]


class _Segments(NamedTuple):
    """Segments of one length in a packed sequence."""

    tokens: torch.Tensor | None  # int64 [segments * length]; None: all of the sequence, in order
    length: int


class SDPABackend:
    name = "sdpa"

    def plan(self, metadata: AttentionMetadata) -> _StepPlan:
        query_lens, seq_lens = metadata.query_lens, metadata.seq_lens
        starts = np.cumsum(query_lens) - query_lens
        num_blocks = -(-seq_lens // metadata.block_size)
        single = np.flatnonzero(query_lens == 1)
        # The bit length of the number of blocks: a group's longest is less than twice its shortest.
        groups = np.frexp(num_blocks[single])[1]
        decodes = []
        for group in np.unique(groups):
            requests = single[groups == group]
            decodes.append(self._plan_decodes(metadata, requests, starts[requests], int(seq_lens[requests].max())))
        longer = np.flatnonzero(query_lens > 1)
        chunks = [self._plan_chunk(metadata, i, int(starts[i]), int(num_blocks[i])) for i in longer.tolist()]
        return _StepPlan(decodes, chunks)

    @staticmethod
    def _plan_decodes(metadata: AttentionMetadata, requests: np.ndarray, starts: np.ndarray, longest: int) -> _Decodes:
        device, block_size = metadata.block_table.device, metadata.block_size
        rows, lens, tokens = metadata.rows, metadata.seq_lens_device, None
        if len(requests) < len(metadata.query_lens):
            chosen, tokens = (torch.from_numpy(x).to(device, non_blocking=True) for x in (requests, starts))
            rows, lens = rows.index_select(0, chosen), lens.index_select(0, chosen)
        places = torch.arange(longest, dtype=torch.int32, device=device)
        mask = places < lens[:, None]  # [R, S]
        places = torch.where(mask, places, 0)
        table = metadata.block_table[:, : -(-longest // block_size)].index_select(0, rows)
        slots = table.gather(1, (places // block_size).long()) * block_size + places % block_size
        return _Decodes(tokens, slots.flatten(), mask[:, None, None])

    @staticmethod
    def _plan_chunk(metadata: AttentionMetadata, request: int, start: int, num_blocks: int) -> _Chunk:
        length, seq_len = int(metadata.query_lens[request]), int(metadata.seq_lens[request])
        if length == seq_len:
            return _Chunk(start, start + length, None, seq_len, None)
        device = metadata.block_table.device
        # Measured with torch 2.11 on an H100: its float32 kernel with a mask gets the last query wrong when it is alone in a
        # tile of 64. One query more, whose result is dropped, gives it company.
        rows = length + (length % _QUERY_TILE == 1)
        mask = torch.ones(rows, seq_len, dtype=torch.bool, device=device).tril(seq_len - length)
        row = metadata.rows[request : request + 1]
        blocks = metadata.block_table[:, :num_blocks].index_select(0, row).flatten()
        return _Chunk(start, start + length, blocks, seq_len, mask)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        plan: _StepPlan,
        scale: float,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        for decodes in plan.decodes:
            self._decode(query, kv_cache, decodes, scale, output)
        for chunk in plan.chunks:
            self._prefill(query, key, value, kv_cache, chunk, scale, output)
        return output

    @staticmethod
    def _decode(query: torch.Tensor, kv_cache: torch.Tensor, plan: _Decodes, scale: float, output: torch.Tensor) -> None:
        rows, padded = plan.mask.shape[0], plan.mask.shape[-1]
        num_kv_heads, head_dim = kv_cache.shape[-2:]
        q = query if plan.tokens is None else query.index_select(0, plan.tokens)
        q = q.view(rows, num_kv_heads, -1, head_dim)  # the queries of a group take the place of the query axis
        gathered = kv_cache.flatten(1, 2).index_select(1, plan.slots).view(2, rows, padded, num_kv_heads, head_dim)
        k, v = gathered.transpose(2, 3).unbind(0)  # [R, KV, S, D] each
        attended = scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, scale=scale).reshape(rows, -1, head_dim)
        if plan.tokens is None:
            output.copy_(attended)
        else:
            output.index_copy_(0, plan.tokens, attended)

    @staticmethod
    def _prefill(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        chunk: _Chunk,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        num_kv_heads, head_dim = kv_cache.shape[-2:]
        if chunk.blocks is None:
            k, v = key[chunk.start : chunk.stop], value[chunk.start : chunk.stop]
        else:
            gathered = kv_cache.index_select(1, chunk.blocks).view(2, -1, num_kv_heads, head_dim)
            k, v = gathered[:, : chunk.seq_len].unbind(0)
        q = query[chunk.start : chunk.stop].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [KV, group, L, D]
        group = q.shape[1]
        k, v = (x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))  # [KV, group, S, D]
        if chunk.mask is None:
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            length, padding = q.shape[2], chunk.mask.shape[0] - q.shape[2]
            attended = scaled_dot_product_attention(pad(q, (0, 0, 0, padding)), k, v, attn_mask=chunk.mask, scale=scale)
            attended = attended[:, :, :length]
        output[chunk.start : chunk.stop] = attended.permute(2, 0, 1, 3).flatten(1, 2)

    def layout(self, most_requests: int, block_table: torch.Tensor, block_size: int, output: torch.Tensor) -> None:
        """It goes sequence by sequence, on the host."""

    def plan_varlen(self, seqlens: Sequence[int], device: torch.device, room: SegmentRoom | None = None) -> list[_Segments]:
        if room is not None:
            raise ValueError("sdpa lays segments out by their lengths: its plans cannot be recorded")
        lengths = np.asarray(seqlens, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        plan = []
        for length in np.unique(lengths).tolist():
            chosen = starts[lengths == length]
            if len(chosen) == len(lengths):
                plan.append(_Segments(None, length))
            else:
                tokens = (chosen[:, None] + np.arange(length)).ravel()
                plan.append(_Segments(torch.from_numpy(tokens).to(device, non_blocking=True), length))
        return plan

    def varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[_Segments], scale: float
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        for tokens, length in plan:
            q, k, v = (
                (x if tokens is None else x.index_select(0, tokens)).unflatten(0, (-1, length)).transpose(1, 2)
                for x in (query, key, value)
            )  # [segments, H, length, D]
            attended = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
            if tokens is None:
                return attended
            output.index_copy_(0, tokens, attended)
        return output
