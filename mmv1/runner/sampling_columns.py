"""How each request wants its next token chosen: `SamplingParams` as columns, a request's row in each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmv1.types import SamplingParams

_GREEDY_BELOW = 1e-5  # a temperature under this is taken as 0


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The columns of the S requests that sample in a step, on the host. What nobody asks for, the sampler skips."""

    rows: np.ndarray  # int64: rows of the device's token ids
    num_tokens: np.ndarray  # int64: tokens the choice follows
    num_prompt_tokens: np.ndarray  # int64
    temperature: np.ndarray  # float32; 0: greedy
    top_p: np.ndarray  # float32; 1: off
    top_k: np.ndarray  # int64; 0: off
    min_p: np.ndarray  # float32; 0: off
    presence_penalty: np.ndarray  # float32; 0: off
    frequency_penalty: np.ndarray  # float32; 0: off
    repetition_penalty: np.ndarray  # float32; 1: off
    seed: np.ndarray  # uint64
    logprobs: np.ndarray  # int64; -1: none


class SamplingColumns:
    def __init__(self, max_num_seqs: int) -> None:
        self._floats = {
            name: np.zeros(max_num_seqs, dtype=np.float32)
            for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        }
        self._ints = {name: np.zeros(max_num_seqs, dtype=np.int64) for name in ("top_k", "logprobs", "num_prompt_tokens")}
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)

    def set(self, row: int, params: SamplingParams, num_prompt_tokens: int, seed: int) -> None:
        for name, column in self._floats.items():
            column[row] = getattr(params, name)
        if params.temperature < _GREEDY_BELOW:
            self._floats["temperature"][row] = 0.0
        self._ints["top_k"][row] = max(params.top_k, 0)
        self._ints["logprobs"][row] = -1 if params.logprobs is None else params.logprobs
        self._ints["num_prompt_tokens"][row] = num_prompt_tokens
        self._seed[row] = seed

    def select(self, rows: np.ndarray, num_tokens: np.ndarray) -> SamplingBatch:
        """The columns at `rows` [S]; `num_tokens` [S] as in SamplingBatch."""
        columns = {name: column[rows] for name, column in (self._floats | self._ints).items()}
        return SamplingBatch(rows=rows, num_tokens=num_tokens, seed=self._seed[rows], **columns)
