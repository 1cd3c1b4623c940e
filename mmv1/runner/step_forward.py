"""The model over one step's tokens.

A step of few tokens, decodes above all, is launched as one recorded graph: the step's layout lies in device memory, padded to
the next recorded number of tokens. So launching costs the host almost nothing, and the device does not wait between kernels. A
larger step keeps the device busy longer than its launches take; it runs kernel by kernel at its own size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmv1.models.interface import Model
from mmv1.runner.attention.backend import AttentionBackend, AttentionMetadata, PagedAttention
from mmv1.runner.attention.triton import (
    TilePlan,
    TritonBackend,
    choose_num_splits,
    make_tiles,
    num_multiprocessors,
    small_tile_tokens,
)
from mmv1.runner.input_batch import DeviceTable, StepInputs, TokenColumns
from mmv1.runner.platform import Platform

# Numbers of tokens that are recorded. Close together where padding would cost most of a step's time.
GRAPH_SIZES = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 129, 16), *range(160, 257, 32), 320, 384, 448, 512)

# The recorded attention reads a request's keys once per tile of a few tokens. Beyond as many keys in a step, the chunks of it
# taken together, that is no longer little beside the rest of the step.
_MAX_TILE_KEYS = 400_000


class _Recorded(NamedTuple):
    inputs: torch.Tensor  # int32 [3 + axes + 4, size]: TokenColumns, then tiles
    replay: Callable[[], object]
    hidden: torch.Tensor  # [size, hidden]


class StepForward:
    """`token_ids` and `block_table`: the tables of all requests. `image_embeddings` [rows, width]: the encoder cache."""

    def __init__(
        self,
        model: Model,
        platform: Platform,
        backend: AttentionBackend,
        kv_caches: Sequence[torch.Tensor],
        token_ids: DeviceTable,
        block_table: DeviceTable,
        image_embeddings: torch.Tensor,
        block_size: int,
    ) -> None:
        self._model = model
        self._platform = platform
        self._backend = backend
        self._kv_caches = kv_caches
        self._token_ids = token_ids
        self._block_table = block_table
        self._image_embeddings = image_embeddings
        self._block_size = block_size
        self._recorded: dict[int, _Recorded] = {}
        self._sizes: list[int] = []  # recorded, in order
        layer = model.attention_layers[0]
        self._num_kv_heads = layer.num_kv_heads
        self._tile_tokens = small_tile_tokens(layer.num_heads // layer.num_kv_heads)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [T, hidden]; valid until the next call."""
        size = self._recorded_size(inputs)
        return self._launch(inputs) if size is None else self._replay(self._recorded[size], inputs)

    def record(self, sizes: Sequence[int]) -> None:
        """Record steps of these numbers of tokens. The largest first: the others then find room in its memory."""
        recorder = self._platform.recorder()
        num_columns = 3 + self._model.num_position_axes + 4
        layer = self._model.attention_layers[0]
        # Padding is attended to by nobody: its rows keep what an earlier step put there, or these zeroes. So what padding writes
        # to the null block is finite, which a backend that multiplies masked values by 0 relies on.
        attended = self._kv_caches[0].new_zeros(max(sizes, default=0), layer.num_heads, layer.head_dim)
        for size in sorted(sizes, reverse=True):
            inputs = torch.zeros(num_columns, size, dtype=torch.int32, device=self._platform.device)
            inputs[2].fill_(-1)
            most_keys = self._block_table.width * self._block_size
            splits = choose_num_splits(size, self._num_kv_heads, most_keys, num_multiprocessors(self._platform.device))
            tables = inputs[-4:], self._block_table.tensor
            plan = TilePlan(*tables, self._block_size, self._tile_tokens, splits, attended[:size])

            def run(inputs: torch.Tensor = inputs, plan: TilePlan = plan) -> torch.Tensor:
                return self._run(TokenColumns.of(inputs[:-4]), TritonBackend(), plan)

            run()  # loads the kernels, which a recording cannot
            self._recorded[size] = _Recorded(inputs, *recorder.record(run))
        self._sizes = sorted(self._recorded)

    def _recorded_size(self, inputs: StepInputs) -> int | None:
        place = bisect_left(self._sizes, inputs.num_tokens)
        if place == len(self._sizes):
            return None
        size = self._sizes[place]
        if inputs.num_tokens == len(inputs.rows):
            return size
        chunks = inputs.query_lens > 1
        num_keys = (-(-inputs.query_lens[chunks] // self._tile_tokens) * inputs.seq_lens[chunks]).sum()
        return size if num_keys <= _MAX_TILE_KEYS else None

    def _replay(self, recorded: _Recorded, inputs: StepInputs) -> torch.Tensor:
        num_columns, size = recorded.inputs.shape
        staging = self._platform.staging(num_columns, size, dtype=torch.int32)
        host, num_tokens = staging.numpy(), inputs.num_tokens
        host[:-4, :num_tokens] = inputs.packed
        host[:-4, num_tokens:] = 0  # padding: token 0 of row 0, to the null block
        host[2, num_tokens:] = -1
        host[-4:] = make_tiles(inputs.rows, inputs.starts, inputs.query_lens, inputs.computed, self._tile_tokens, num_tiles=size)
        recorded.inputs.copy_(staging, non_blocking=True)
        recorded.replay()
        return recorded.hidden[:num_tokens]

    def _launch(self, inputs: StepInputs) -> torch.Tensor:
        query_start_loc = np.zeros(len(inputs.rows) + 1, dtype=np.int32)
        query_start_loc[1:] = np.cumsum(inputs.query_lens)
        start_loc, seq_lens, rows, packed = self._platform.upload_together(
            query_start_loc, inputs.seq_lens.astype(np.int32), inputs.rows.astype(np.int32), inputs.packed.reshape(-1)
        )
        plan = self._backend.plan(
            AttentionMetadata(
                query_lens=inputs.query_lens,
                seq_lens=inputs.seq_lens,
                query_start_loc=start_loc,
                seq_lens_device=seq_lens,
                rows=rows,
                host_rows=inputs.rows,
                block_table=self._block_table.tensor,
                block_size=self._block_size,
            )
        )
        return self._run(TokenColumns.of(packed.view(inputs.packed.shape)), self._backend, plan)

    def _run(self, columns: TokenColumns, backend: AttentionBackend, plan: object) -> torch.Tensor:
        input_ids = self._token_ids.flat.index_select(0, columns.places)
        embedded = self._model.embed(input_ids, columns.image_rows, self._image_embeddings)
        attention = PagedAttention(backend, plan, self._kv_caches, columns.slot_mapping)
        return self._model.forward(embedded, columns.positions, attention)
