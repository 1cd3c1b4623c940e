"""Sampling parameters as scripts give them: refused with a name, never passed on to hang or kill something."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mmv1.engine.sampling import check_sampling_params
from mmv1.errors import RequestError
from mmv1.types import SamplingParams


def test_the_defaults_and_every_limit_are_accepted() -> None:
    assert check_sampling_params(SamplingParams()) == SamplingParams()
    least = SamplingParams(
        temperature=0, top_p=1e-9, top_k=-1, min_p=0, seed=-(1 << 63), max_tokens=1, presence_penalty=-2, frequency_penalty=-2,
        repetition_penalty=1e-9, logprobs=0,
    )  # fmt: skip
    most = SamplingParams(
        n=256, temperature=1e9, top_p=1, top_k=(1 << 31) - 1, min_p=1, seed=(1 << 63) - 1, presence_penalty=2,
        frequency_penalty=2, repetition_penalty=100.0, logprobs=20,
    )  # fmt: skip
    assert check_sampling_params(least) == least
    assert check_sampling_params(most) == most


def test_one_stop_string_may_be_a_str() -> None:
    assert check_sampling_params(SamplingParams(stop="END")).stop == ("END",)  # type: ignore[arg-type]
    assert check_sampling_params(SamplingParams(stop=["a", "b"])).stop == ("a", "b")  # type: ignore[arg-type]


WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 257, 1.0, True, None],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True],
    "top_p": [0, -1, 1.1, math.nan, None],
    "top_k": [-2, 1 << 31, 2.0, None],
    "min_p": [-0.1, 1.1, math.nan],
    "seed": [1 << 63, 1 << 70, -(1 << 64), 1.5, True],
    "max_tokens": [0, -5, 2.0, True],
    "stop": [[""], [1], ["a", None]],
    "stop_token_ids": [[-1], [1.5], [True], [1 << 40]],
    "presence_penalty": [-2.1, 2.1, math.nan, None],
    "frequency_penalty": [-2.1, 2.1, math.inf],
    "repetition_penalty": [0, -1, math.inf, math.nan],
    "logprobs": [-1, 1.0, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_cannot_work_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        check_sampling_params(SamplingParams(**{name: value}))
    assert caught.value.param == name
