"""Grammars: what is refused and how soon, and a matcher's masks against the texts that its grammar allows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mmv1.errors import RequestError
from mmv1.scheduler.grammar import GrammarMatcher, Grammars
from mmv1.types import StructuredOutputs

TIMEOUT_S = 30.0
SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string", "maxLength": 200}, "count": {"type": "integer"}},
    "required": ["caption", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def eos(tokenizer: Tokenizer) -> int:
    return int(tokenizer.token_to_id("<|im_end|>"))


@pytest.fixture(scope="module")
def grammars(tiny_model_dir: Path, eos: int) -> Grammars:
    vocab_size = json.loads((tiny_model_dir / "config.json").read_text())
    return Grammars(tiny_model_dir, int(vocab_size.get("vocab_size") or vocab_size["text_config"]["vocab_size"]), [eos])


def start(grammars: Grammars, **asked: Any) -> GrammarMatcher:
    return grammars.compile(StructuredOutputs(**asked)).result(TIMEOUT_S)


def allowed(matcher: GrammarMatcher) -> set[int]:
    return {i * 8 + bit for i, byte in enumerate(matcher.mask()) for bit in range(8) if byte >> bit & 1}


def follows(matcher: GrammarMatcher, tokenizer: Tokenizer, text: str, eos: int) -> bool:
    """Whether every token of the text, and then the end, is in its turn's mask."""
    for token in [*tokenizer.encode(text, add_special_tokens=False).ids, eos]:
        if token not in allowed(matcher):
            return False
        assert matcher.advance(token), matcher.error
    return True


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"json": SCHEMA}, ['{"caption": "a \\"cat\\"", "count": 3}', '{"caption":"","count":-1}'], ["{}", '{"count": 1}']),
        ({"json": json.dumps(SCHEMA)}, ['{\n  "caption": "é",\n  "count": 0\n}'], ['{"caption": "' + "x" * 201 + '"', "hello"]),
        ({"json": {"enum": ["red", 3, None]}}, ['"red"', "3", "null"], ['"blue"', "4"]),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "3", '"x"']),
        ({"regex": "[0-9]{3}-[a-f]+"}, ["123-abc", "000-f"], ["12-a", "123-g", "x123-a", "123-"]),
        ({"choice": ("cat", "category", 'a "dog"\\\n', "猫🐈")}, ["cat", "category", 'a "dog"\\\n', "猫🐈"], ["ca", "cats"]),
        ({"grammar": 'start: "a" | "b" start'}, ["a", "bba"], ["b", "ab", "c"]),
        ({"grammar": 'root ::= "x" digit+\ndigit ::= [0-9]'}, ["x1", "x42"], ["x", "1"]),
    ],
    ids=str,
)
def test_exactly_what_a_grammar_allows(
    grammars: Grammars, tokenizer: Tokenizer, eos: int, asked: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert follows(start(grammars, **asked), tokenizer, text, eos), text
    for text in bad:
        assert not follows(start(grammars, **asked), tokenizer, text, eos), text


def test_behind_a_complete_grammar_only_the_end_may_follow(grammars: Grammars, tokenizer: Tokenizer, eos: int) -> None:
    matcher = start(grammars, choice=("yes",))
    for token in tokenizer.encode("yes", add_special_tokens=False).ids:
        assert matcher.advance(token)
    assert allowed(matcher) == {eos}
    assert not matcher.advance(tokenizer.encode("s").ids[0])
    assert matcher.error


def test_a_token_outside_the_mask_ends_it_with_a_reason(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = start(grammars, regex="[0-9]+")
    assert not matcher.advance(tokenizer.encode("x").ids[0])
    assert matcher.error and "\n" not in matcher.error and "<state>" not in matcher.error


def test_white_space_has_an_end(grammars: Grammars, tokenizer: Tokenizer, eos: int) -> None:
    assert follows(start(grammars, json=SCHEMA), tokenizer, '{\n' + " " * 20 + '"caption": "x", "count": 1}', eos)
    for white_space in ("  ", "\n\n", "\n" + " " * 30):
        assert not follows(start(grammars, json=SCHEMA), tokenizer, "{" + white_space + '"caption": "x", "count": 1}', eos)


@pytest.mark.parametrize(
    "asked",
    [
        {"json": {"type": "objekt"}},
        {"json": {"type": "string", "pattern": "("}},
        {"json": {"$ref": "http://169.254.169.254/x"}},
        {"json": "{not json"},
        {"json": "3"},
        {"regex": "(a"},
        {"regex": "(?=a)b"},
        {"grammar": "start: missing"},
        {"grammar": "root ::= ("},
        {"regex": "x" * (1 << 19)},
    ],
    ids=lambda asked: str(asked)[:40],
)
def test_what_cannot_be_followed_is_refused_in_one_sentence(grammars: Grammars, asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"guided_x cannot be followed: .") as caught:
        grammars.check(StructuredOutputs(**asked, param="guided_x")).result(TIMEOUT_S)
    assert (caught.value.param, caught.value.code) == ("guided_x", "invalid_grammar")
    assert not {"\n", "|"} & set(caught.value.message) and len(caught.value.message) < 400


def test_a_schema_with_lengths_is_checked_in_milliseconds(grammars: Grammars) -> None:
    grammars.check(StructuredOutputs(json=SCHEMA)).result(TIMEOUT_S)  # reads the tokenizer
    took = []
    for length in (200, 5000, 100_000):
        schema = {"type": "object", "properties": {"caption": {"type": "string", "maxLength": length}}, "required": ["caption"]}
        before = time.perf_counter()
        grammars.check(StructuredOutputs(json=schema)).result(TIMEOUT_S)
        took.append(time.perf_counter() - before)
    assert min(took) < 0.1, took


def test_without_end_of_sequence_there_is_no_grammar(tiny_model_dir: Path) -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        Grammars(tiny_model_dir, 576, []).check(StructuredOutputs(regex="a")).result(TIMEOUT_S)
