"""How each request wants its next token chosen: `SamplingParams` as columns, a request's row in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmv1.runner.token_rules import TokenRules, make_token_rules
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
    is_simple: np.ndarray  # bool: asks for no more than a temperature
    token_rules: np.ndarray  # TokenRules or None
    masks: np.ndarray  # bytes (see SchedulerOutput.token_masks) or None


class SamplingColumns:
    def __init__(self, max_num_seqs: int) -> None:
        floats = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        dtypes: dict[str, type[np.generic]] = {"seed": np.uint64, "is_simple": np.bool_, "token_rules": np.object_}
        dtypes |= dict.fromkeys(floats, np.float32) | dict.fromkeys(("top_k", "logprobs", "num_prompt_tokens"), np.int64)
        self._columns = {name: np.zeros(max_num_seqs, dtype=dtype) for name, dtype in dtypes.items()}

    def set(
        self, row: int, params: SamplingParams, num_prompt_tokens: int, seed: int, eos_token_ids: Sequence[int] = ()
    ) -> None:
        rules = make_token_rules(params, eos_token_ids)
        is_greedy = params.temperature < _GREEDY_BELOW
        values = {
            "temperature": 0.0 if is_greedy else params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "top_k": max(params.top_k, 0),
            "logprobs": -1 if params.logprobs is None else params.logprobs,
            "num_prompt_tokens": num_prompt_tokens,
            "seed": seed,
            "is_simple": _is_simple(params, rules, is_greedy),
            "token_rules": rules,
        }
        for name, column in self._columns.items():
            column[row] = values[name]

    def select(
        self, rows: np.ndarray, num_tokens: np.ndarray, masks: Sequence[bytes | None] | None = None
    ) -> SamplingBatch:
        """The columns at `rows` [S]; `num_tokens` [S] and `masks` [S] as in SamplingBatch."""
        given = np.full(len(rows), None, dtype=np.object_)
        if masks is not None:
            given[:] = masks
        columns = {name: column[rows] for name, column in self._columns.items()}
        return SamplingBatch(rows=rows, num_tokens=num_tokens, masks=given, **columns)


def _is_simple(params: SamplingParams, rules: TokenRules | None, is_greedy: bool) -> bool:
    """Limits on what may be drawn do not matter to a request that takes the likeliest token anyway."""
    is_limited = not is_greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    is_penalized = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    is_ruled = rules is not None or params.structured_outputs is not None
    return not is_limited and not is_penalized and not is_ruled and params.logprobs is None
