"""The model over one step's tokens.

A step is launched as one recorded graph: its layout lies in device memory, padded to the next recorded number of tokens. So
launching costs the host almost nothing, and the device does not wait between kernels. A step of few tokens attends by tiles of
our own kernels; a larger one as the backend chosen for it does, where that can be recorded. The largest keep the device busy
longer than their launches take; they run kernel by kernel at their own size, and so does whatever no recording fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from mmv1.models.interface import Model
from mmv1.runner.attention.backend import AttentionBackend, AttentionMetadata, PagedAttention, RecordedLayout
from mmv1.runner.attention.triton import TritonBackend, tile_layouts
from mmv1.runner.input_batch import DeviceTable, StepInputs, TokenColumns
from mmv1.runner.platform import Platform

# Numbers of tokens that are recorded. Close together where padding would cost most of a step's time; multiples of the 128 rows of
# a matrix product's tile where products are most of it.
_TILED_SIZES = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 129, 16), *range(160, 257, 32), 320, 384, 448, 512)
GRAPH_SIZES = (*_TILED_SIZES, *range(640, 4097, 128))
MOST_TILED = _TILED_SIZES[-1]

# Requests that a larger recorded step has room for. Room costs every step, used or not: a small one more of its time.
_MOST_REQUESTS = 256
_MOST_REQUESTS_OF_SMALLER = 128
_SMALLER = 1024


class _Recorded(NamedTuple):
    size: int  # most tokens
    layout: RecordedLayout
    inputs: torch.Tensor  # int32, flat: TokenColumns of `size` tokens, then the layout's numbers
    replay: Callable[[], object]
    hidden: torch.Tensor  # [size, hidden], memory of all recordings together


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
        self._recorded: dict[int, list[_Recorded]] = {}  # by size; of one size the first that fits is the best
        self._sizes: list[int] = []  # recorded, in order
        layer = model.attention_layers[0]
        self._num_columns = 3 + model.num_position_axes  # of TokenColumns
        self._num_kv_heads = layer.num_kv_heads

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [T, hidden]; valid until the next call."""
        recorded = self._recorded_for(inputs)
        return self._launch(inputs) if recorded is None else self._replay(recorded, inputs)

    def record(self, sizes: Sequence[int]) -> None:
        """Record steps of these numbers of tokens, but those whose attention cannot be. The largest first: the others then find
        room in its memory."""
        recorder = self._platform.recorder()
        layer = self._model.attention_layers[0]
        # Padding is attended to by nobody: its rows keep what an earlier step put there, or these zeroes. So what padding writes
        # to the null block is finite, which a backend that multiplies masked values by 0 relies on.
        attended = self._kv_caches[0].new_zeros(max(sizes, default=0), layer.num_heads, layer.head_dim)
        hidden: torch.Tensor | None = None
        for size in sorted(sizes, reverse=True):
            backend, layouts = self._lay_out(size, attended[:size])
            for layout in layouts:
                num_columns = self._num_columns * size
                inputs = torch.zeros(num_columns + layout.num_numbers, dtype=torch.int32, device=self._platform.device)
                inputs[2 * size : 3 * size].fill_(-1)
                columns, numbers = inputs.split([num_columns, layout.num_numbers])
                run = partial(self._run_recorded, columns.view(-1, size), backend, layout, numbers)
                warmed_up = run()  # loads the kernels, which a recording cannot
                hidden = torch.empty_like(warmed_up) if hidden is None else hidden
                replay, output = recorder.record(partial(_copy, run, hidden[:size]))
                self._recorded.setdefault(size, []).append(_Recorded(size, layout, inputs, replay, output))
        self._sizes = sorted(self._recorded)

    def _lay_out(self, size: int, attended: torch.Tensor) -> tuple[AttentionBackend, Sequence[RecordedLayout]]:
        table = self._block_table.tensor
        if size > MOST_TILED:
            most_requests = min(len(table), _MOST_REQUESTS if size > _SMALLER else _MOST_REQUESTS_OF_SMALLER)
            layout = self._backend.layout(most_requests, table, self._block_size, attended)
            return self._backend, [] if layout is None else [layout]
        return TritonBackend(), tile_layouts(size, self._num_kv_heads, table, self._block_size, attended)

    def _run_recorded(
        self, columns: torch.Tensor, backend: AttentionBackend, layout: RecordedLayout, numbers: torch.Tensor
    ) -> torch.Tensor:
        return self._run(TokenColumns.of(columns), backend, layout.plan(numbers))

    def _recorded_for(self, inputs: StepInputs) -> _Recorded | None:
        place = bisect_left(self._sizes, inputs.num_tokens)
        if place == len(self._sizes):
            return None
        fitting = (one for one in self._recorded[self._sizes[place]] if one.layout.fits(inputs.query_lens, inputs.seq_lens))
        return next(fitting, None)

    def _replay(self, recorded: _Recorded, inputs: StepInputs) -> torch.Tensor:
        staging = self._platform.staging(len(recorded.inputs), dtype=torch.int32)
        num_columns = self._num_columns * recorded.size
        host, num_tokens = staging.numpy()[:num_columns].reshape(-1, recorded.size), inputs.num_tokens
        host[:, :num_tokens] = inputs.packed
        host[:, num_tokens:] = 0  # padding: token 0 of row 0, to the null block
        host[2, num_tokens:] = -1
        recorded.layout.write(staging.numpy()[num_columns:], inputs.rows, inputs.query_lens, inputs.computed)
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


def _copy(run: Callable[[], torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return target.copy_(run())
