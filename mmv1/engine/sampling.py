"""Sampling parameters as a caller gives them, checked before anything is made of them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from tokenizers import Tokenizer

from mmv1.errors import RequestError
from mmv1.types import SamplingParams, StructuredOutputs

MAX_N = 256
_ABOVE_ZERO = ("top_p", "repetition_penalty")
_MAX_BIAS = 100.0
_MAX_INT32, _MAX_INT64 = (1 << 31) - 1, (1 << 63) - 1


def check_sampling_params(params: SamplingParams) -> SamplingParams:
    """The same parameters, with one stop string given as a str made a tuple. Raises RequestError that names the parameter."""
    stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise _wrong("stop", "non-empty strings")
    stop_token_ids = _token_ids("stop_token_ids", params.stop_token_ids)
    for name, low, high in (
        ("n", 1, MAX_N),
        ("top_k", -1, _MAX_INT32),
        ("seed", -_MAX_INT64 - 1, _MAX_INT64),
        ("max_tokens", 1, _MAX_INT64),
        ("min_tokens", 0, _MAX_INT64 if params.max_tokens is None else params.max_tokens),
        ("logprobs", 0, _MAX_INT32),
    ):
        value = getattr(params, name)
        if not (value is None and name in ("seed", "max_tokens", "logprobs")) and not _is_int(value, low, high):
            bounds = f"of at least {low}" if low >= 0 and high == _MAX_INT64 else f"from {low} to {high}"
            raise _wrong(name, f"an integer {bounds}")
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
        if not _is_number(value, lowest, highest) or excluded:
            raise _wrong(name, f"a number {'above' if name in _ABOVE_ZERO else 'from'} {lowest:g}, {_upto(highest)}")
    return msgspec.structs.replace(params, stop=stop, stop_token_ids=stop_token_ids, **_check_token_rules(params))


def _check_token_rules(params: SamplingParams) -> dict[str, Any]:
    """What says which tokens may come, in its checked form."""
    if not isinstance(params.logit_bias, dict) or not all(
        _is_int(token, 0, _MAX_INT32) and _is_number(bias, -_MAX_BIAS, _MAX_BIAS) for token, bias in params.logit_bias.items()
    ):
        raise _wrong("logit_bias", f"token ids with numbers from {-_MAX_BIAS:g} to {_MAX_BIAS:g}")
    bad_words = tuple(params.bad_words)
    if not all(isinstance(word, str) and word.strip() for word in bad_words):
        raise _wrong("bad_words", "strings that are not blank")
    allowed = params.allowed_token_ids
    if allowed is not None:
        allowed = _token_ids("allowed_token_ids", allowed)
        if not allowed:
            raise _wrong("allowed_token_ids", "at least one token id")
        if params.structured_outputs is not None:
            message = f"allowed_token_ids does not go with {params.structured_outputs.param}"
            raise RequestError(message, param="allowed_token_ids")
    if params.structured_outputs is not None:
        _check_structured_outputs(params.structured_outputs)
    return {"bad_words": bad_words, "bad_words_token_ids": (), "allowed_token_ids": allowed}


def _check_structured_outputs(asked: StructuredOutputs) -> None:
    given = [name for name in ("json", "regex", "choice", "grammar") if getattr(asked, name) is not None]
    if len(given) + asked.json_object != 1:
        raise _wrong(asked.param, "exactly one of json, regex, choice, grammar and json_object", asked.param)
    if asked.choice is not None and not (asked.choice and all(isinstance(each, str) and each for each in asked.choice)):
        raise _wrong("choice", "non-empty strings, at least one", asked.param)
    if isinstance(asked.json, dict):
        try:
            msgspec.msgpack.encode(asked.json)  # as it will go to the core
        except (OverflowError, RecursionError, TypeError, UnicodeEncodeError):
            kind = "a JSON schema, not nested too deeply, with integers of at most 64 bits"
            raise _wrong(asked.param, kind, asked.param) from None


def resolve_tokens(params: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """The same parameters, checked, with the tokens that `bad_words` are. Raises RequestError for tokens there are not."""
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        if max(getattr(params, name) or (), default=0) >= vocab_size:
            raise RequestError(f"{name}: the vocabulary has {vocab_size} tokens", param=name)
    if not params.bad_words:
        return params
    words = {spelled for word in params.bad_words for spelled in _spellings(word.lstrip(), tokenizer)}
    return msgspec.structs.replace(params, bad_words_token_ids=tuple(sorted(words)))


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The word's tokens at the beginning of a text; and behind a space, if that is another first token and as many of them, which
    is vLLM's rule."""
    alone, behind_space = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in (word, f" {word}"))
    is_other = len(alone) == len(behind_space) and alone[:1] != behind_space[:1]
    return [ids for ids in ((alone, behind_space) if is_other else (alone,)) if ids]


def _token_ids(name: str, given: Any) -> tuple[int, ...]:
    token_ids = tuple(given)
    if not all(_is_int(token, 0, _MAX_INT32) for token in token_ids):
        raise _wrong(name, "token ids")
    return token_ids


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _upto(highest: float) -> str:
    return "and finite" if math.isinf(highest) else f"at most {highest:g}"


def _wrong(name: str, what: str, param: str | None = None) -> RequestError:
    return RequestError(f"{name} must be {what}", param=param or name)
