"""Sampling parameters as scripts give them: refused with a name, never passed on to hang or kill something."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mmv1.engine.sampling import check_sampling_params, resolve_tokens
from mmv1.errors import RequestError
from mmv1.types import SamplingParams, StructuredOutputs


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


WRONG_RULES: dict[str, list[Any]] = {
    "logit_bias": [[1], {-1: 1.0}, {1: 100.5}, {1: math.nan}, {1: "2"}, {True: 1.0}, {"1": 1.0}],
    "min_tokens": [-1, 1.0, True, None],
    "bad_words": [[""], [" "], [1]],
    "allowed_token_ids": [[], [-1], [1.5]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_RULES.items() for value in values])
def test_rules_that_cannot_work_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        check_sampling_params(SamplingParams(**{name: value}))
    assert caught.value.param == name


def test_more_tokens_than_may_be_cannot_be_demanded() -> None:
    assert check_sampling_params(SamplingParams(min_tokens=5, max_tokens=5)).min_tokens == 5
    with pytest.raises(RequestError, match="min_tokens must be an integer from 0 to 5"):
        check_sampling_params(SamplingParams(min_tokens=6, max_tokens=5))


def test_a_bound_that_is_none_is_not_said() -> None:
    with pytest.raises(RequestError, match=r"max_tokens must be an integer of at least 1$"):
        check_sampling_params(SamplingParams(max_tokens=0))


@pytest.mark.parametrize(
    "asked", [{}, {"regex": "a", "json_object": True}, {"json": {}, "choice": ("a",)}, {"choice": ()}, {"choice": ("",)}]
)
def test_an_answer_has_one_form(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling_params(SamplingParams(structured_outputs=StructuredOutputs(**asked, param="guided_x")))
    assert caught.value.param == "guided_x"


@pytest.mark.parametrize("params", [{"logit_bias": {500: 1.0}}, {"allowed_token_ids": (3, 500)}, {"stop_token_ids": (500,)}])
def test_tokens_outside_the_vocabulary_are_refused(params: dict[str, Any]) -> None:
    resolve_tokens(SamplingParams(**params), Tokenizer(BPE()), 501)
    with pytest.raises(RequestError, match="vocabulary has 500") as caught:
        resolve_tokens(SamplingParams(**params), Tokenizer(BPE()), 500)
    assert caught.value.param in params


def test_a_bad_word_is_banned_alone_and_behind_a_space() -> None:
    """A word whose spelling behind a space has another number of tokens
    is banned as it stands alone only."""
    vocabulary = {token: i for i, token in enumerate(["c", "a", "t", " ", "ca", "cat", " cat", "d", "o", "g", "do", "dog"])}
    merges = [("c", "a"), ("ca", "t"), (" ", "cat"), ("d", "o"), ("do", "g")]
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    for word in ("cat", "  cat"):
        assert resolve_tokens(SamplingParams(bad_words=(word,)), tokenizer, 12).bad_words_token_ids == ((5,), (6,))
    assert resolve_tokens(SamplingParams(bad_words=("dog", "at")), tokenizer, 12).bad_words_token_ids == ((1, 2), (11,))


def _nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize("schema", [{"minimum": -(2**63) - 1}, {"enum": [2**64]}, _nested(5000), {"const": "\ud800"}])
def test_a_schema_that_cannot_be_sent_to_the_core_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling_params(SamplingParams(structured_outputs=StructuredOutputs(json=schema, param="guided_json")))
    assert caught.value.param == "guided_json"
