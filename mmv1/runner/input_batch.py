"""The worker's memory of its requests, and each step's inputs made from it.

A request keeps one row from its arrival until it is forgotten, so nothing moves when others leave: a step names the rows it
runs. Rows are columns of numpy arrays on the host; block tables and token ids also live on the device, where only what changed
is written. The device's token ids are complete: the sampler writes there, and the next step reads its inputs from there, so the
host needs no sampled id to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mmv1.errors import EngineError
from mmv1.runner.platform import Platform
from mmv1.runner.positions import RequestPositions
from mmv1.runner.sampling_columns import SamplingBatch, SamplingColumns
from mmv1.step import CachedRequestData, NewRequestData
from mmv1.types import MMFeature


class DeviceTable:
    """int32 [rows, width] on the device, zero at first; host writes are collected and sent together."""

    def __init__(self, platform: Platform, num_rows: int, width: int) -> None:
        self.width = width
        self.tensor = torch.zeros(num_rows, width, dtype=torch.int32, device=platform.device)
        self.flat = self.tensor.view(-1)
        self._platform = platform
        self._pending: list[tuple[int, np.ndarray]] = []

    def write(self, row: int, start: int, values: np.ndarray) -> None:
        self._pending.append((row * self.width + start, values))

    def flush(self) -> None:
        """Send what was written. Of two writes to one place in one flush, neither is sure to win: do not."""
        if not self._pending:
            return
        places = np.concatenate([np.arange(start, start + len(values)) for start, values in self._pending])
        values = np.concatenate([values for _, values in self._pending])
        self._pending.clear()
        self.flat.index_copy_(0, *self._platform.upload_together(places, values))


@dataclass(frozen=True)
class RequestState:
    """What of a request never changes while it is known."""

    row: int
    features: list[MMFeature]
    positions: RequestPositions


class TokenColumns(NamedTuple):
    """What the model must know of each of a step's T tokens: views of one int32 [3 + axes, T], on the host or on the device."""

    places: Any  # [T]: where in token_ids.flat the token's id is
    slot_mapping: Any  # [T]: where its key and value go: block id * block_size + place in the block
    image_rows: Any  # [T]: its row of the encoder cache; -1: a text token
    positions: Any  # [axes, T]

    @classmethod
    def of(cls, packed: Any) -> TokenColumns:
        return cls(packed[0], packed[1], packed[2], packed[3:])


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step on the host, flattened: the tokens of R requests one after another, T in all; S of the requests sample."""

    request_ids: list[str]
    rows: np.ndarray  # int64 [R]: of the tables
    starts: np.ndarray  # int64 [R]: a request's first token in the step
    computed: np.ndarray  # int64 [R]: tokens computed before the step
    query_lens: np.ndarray  # int64 [R]
    packed: np.ndarray  # int32 [3 + axes, T]: see TokenColumns
    in_pictures: list[int]  # the requests, by index, whose pictures are not all behind them before the step
    sampling_ids: list[str]  # of the S requests
    sampling_rows: np.ndarray  # int64 [S]
    sampling_tokens: np.ndarray  # int64 [S]: their last tokens in the step
    sampled_places: np.ndarray  # int64 [S]: where in token_ids.flat the sampled ids go

    @property
    def num_tokens(self) -> int:
        return self.packed.shape[1]

    @property
    def seq_lens(self) -> np.ndarray:
        """int64 [R]: tokens of each request once the step is computed."""
        return self.computed + self.query_lens

    @property
    def image_rows(self) -> np.ndarray:
        """int32 [T], to be written to."""
        return TokenColumns.of(self.packed).image_rows


class InputBatch:
    """`num_position_axes`: see `Model`. At most `max_num_seqs` requests are known at a time."""

    def __init__(
        self, platform: Platform, *, max_num_seqs: int, max_model_len: int, block_size: int, num_position_axes: int
    ) -> None:
        self._platform = platform
        self._block_size = block_size
        self._num_axes = num_position_axes
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = DeviceTable(platform, max_num_seqs, max_model_len + 1)  # and one sampled past the end
        self.block_table = DeviceTable(platform, max_num_seqs, max_blocks)
        self._block_ids = np.zeros((max_num_seqs, max_blocks), dtype=np.int64)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)  # known here or on the device, those in flight included
        self._position_delta = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._features_end = np.zeros(max_num_seqs, dtype=np.int64)
        self._sampling = SamplingColumns(max_num_seqs)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def state(self, request_id: str) -> RequestState:
        return self._states[request_id]

    def remove(self, request_id: str) -> None:
        state = self._states.pop(request_id, None)
        if state is None:
            raise EngineError(f"a step ends request {request_id}, which the worker does not know")
        self._free_rows.append(state.row)

    def add(self, data: NewRequestData, positions: RequestPositions, seed: int) -> None:
        """`seed` as an unsigned 64-bit number: the request's own, or the one chosen for it."""
        if data.request_id in self._states or not self._free_rows:
            raise EngineError(f"a step brings request {data.request_id}, which is known already or one more than there are rows")
        row = self._free_rows.pop()
        end = data.mm_features[-1].offset + data.mm_features[-1].num_tokens if data.mm_features else 0
        self._states[data.request_id] = RequestState(row, data.mm_features, positions)
        self._features_end[row] = end
        self.token_ids.write(row, 0, np.array(data.token_ids, dtype=np.int32))
        self._num_blocks[row] = 0
        self._append_blocks(row, data.block_ids)
        self._num_computed[row] = data.num_computed_tokens
        self._num_tokens[row] = len(data.token_ids)
        self._num_prompt[row] = data.num_prompt_tokens
        self._position_delta[row] = positions.delta
        self._sampling.set(row, data.sampling_params, data.num_prompt_tokens, seed, data.eos_token_ids)

    def update(self, cached: CachedRequestData) -> None:
        for request_id, block_ids in zip(cached.request_ids, cached.new_block_ids, strict=True):
            self._append_blocks(self._states[request_id].row, block_ids)

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        start = int(self._num_blocks[row])
        values = np.array(block_ids, dtype=np.int32)
        self._block_ids[row, start : start + len(values)] = values
        self.block_table.write(row, start, values)
        self._num_blocks[row] = start + len(values)

    def prepare(self, num_scheduled_tokens: dict[str, int]) -> StepInputs:
        """The step's inputs; its tokens count as computed from here on, and what it samples as known."""
        self.token_ids.flush()
        self.block_table.flush()
        request_ids = list(num_scheduled_tokens)
        states = [self._states[request_id] for request_id in request_ids]
        rows = np.array([state.row for state in states], dtype=np.int64)
        query_lens = np.fromiter(num_scheduled_tokens.values(), dtype=np.int64, count=len(rows))
        computed = self._num_computed[rows]
        seq_lens = computed + query_lens
        self._check(request_ids, rows, seq_lens)
        ends = np.cumsum(query_lens)
        starts = ends - query_lens
        token_row = np.repeat(rows, query_lens)  # [T]
        index = np.arange(ends[-1]) + np.repeat(computed - starts, query_lens)  # [T]: place in the request
        packed = np.empty((3 + self._num_axes, len(index)), dtype=np.int32)
        columns = TokenColumns.of(packed)
        columns.places[:] = token_row * self.token_ids.width + index
        block, place = np.divmod(index, self._block_size)
        columns.slot_mapping[:] = self._block_ids[token_row, block] * self._block_size + place
        columns.image_rows[:] = -1
        self._place(columns.positions, states, token_row, index, starts, computed, query_lens)

        samples = np.flatnonzero(seq_lens == self._num_tokens[rows])
        sampling_rows = rows[samples]
        self._num_computed[rows] = seq_lens
        self._num_tokens[sampling_rows] += 1
        return StepInputs(
            request_ids=request_ids,
            rows=rows,
            starts=starts,
            computed=computed,
            query_lens=query_lens,
            packed=packed,
            in_pictures=np.flatnonzero(computed < self._features_end[rows]).tolist(),
            sampling_ids=[request_ids[i] for i in samples.tolist()],
            sampling_rows=sampling_rows,
            sampling_tokens=ends[samples] - 1,
            sampled_places=sampling_rows * self.token_ids.width + seq_lens[samples],
        )

    def _check(self, request_ids: list[str], rows: np.ndarray, seq_lens: np.ndarray) -> None:
        """The scheduler's promises: no token is run before it is known, nor without a block."""
        broken = (seq_lens > self._num_tokens[rows]) | (seq_lens > self._num_blocks[rows] * self._block_size)
        if broken.any():
            request_id = request_ids[int(broken.argmax())]
            raise EngineError(f"a step runs more tokens of request {request_id} than are known or have room")

    def _place(
        self,
        positions: np.ndarray,
        states: list[RequestState],
        token_row: np.ndarray,
        index: np.ndarray,
        starts: np.ndarray,
        computed: np.ndarray,
        query_lens: np.ndarray,
    ) -> None:
        """Fill `positions` int32 [axes, T]: past the prompt all axes agree, inside it the family has placed each token."""
        positions[:] = index + self._position_delta[token_row]
        rows = token_row[starts]
        for i in np.flatnonzero(computed < self._num_prompt[rows]):
            start, first = int(starts[i]), int(computed[i])
            prompt = states[i].positions.prompt[:, first : first + int(query_lens[i])]
            positions[:, start : start + prompt.shape[1]] = prompt

    def sampling_batch(self, inputs: StepInputs, token_masks: dict[str, bytes]) -> SamplingBatch:
        """The parameters of the requests that sample, for the token that `prepare` has just counted as known."""
        rows = inputs.sampling_rows
        masks = [token_masks.get(request_id) for request_id in inputs.sampling_ids] if token_masks else None
        return self._sampling.select(rows, self._num_tokens[rows] - 1, masks)
