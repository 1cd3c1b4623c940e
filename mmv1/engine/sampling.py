"""Sampling parameters as a caller gives them, checked before anything is made of them."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from mmv1.errors import RequestError
from mmv1.types import SamplingParams

MAX_N = 256
_ABOVE_ZERO = ("top_p", "repetition_penalty")
_MAX_INT32, _MAX_INT64 = (1 << 31) - 1, (1 << 63) - 1


def check_sampling_params(params: SamplingParams) -> SamplingParams:
    """The same parameters, with one stop string given as a str made a tuple. Raises RequestError that names the parameter."""
    stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise _wrong("stop", "non-empty strings")
    stop_token_ids = tuple(params.stop_token_ids)
    if not all(_is_int(token, 0, _MAX_INT32) for token in stop_token_ids):
        raise _wrong("stop_token_ids", "token ids")
    for name, low, high in (
        ("n", 1, MAX_N),
        ("top_k", -1, _MAX_INT32),
        ("seed", -_MAX_INT64 - 1, _MAX_INT64),
        ("max_tokens", 1, _MAX_INT64),
        ("logprobs", 0, _MAX_INT32),
    ):
        value = getattr(params, name)
        if not (value is None and name in ("seed", "max_tokens", "logprobs")) and not _is_int(value, low, high):
            raise _wrong(name, f"an integer from {low} to {high}")
    for name, lowest, highest in (
        ("temperature", 0.0, math.inf),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repetition_penalty", 0.0, math.inf),
    ):
        value = getattr(params, name)
        excluded = name in _ABOVE_ZERO and value == 0
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not lowest <= value <= highest or excluded:
            raise _wrong(name, f"a number {'above' if name in _ABOVE_ZERO else 'from'} {lowest:g}, {_upto(highest)}")
    return msgspec.structs.replace(params, stop=stop, stop_token_ids=stop_token_ids)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _upto(highest: float) -> str:
    return "and finite" if math.isinf(highest) else f"at most {highest:g}"


def _wrong(name: str, what: str) -> RequestError:
    return RequestError(f"{name} must be {what}", param=name)
