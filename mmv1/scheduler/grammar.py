"""Grammars that answers must follow, by llguidance: compiled, checked and followed on threads of their own. Torch-free.

A grammar is compiled twice: where requests are checked, so that a wrong one is refused with a reason, and in the engine, where
each request has a matcher of its own. The mask for a request's next token is computed as soon as the token before it is
known, while the device runs the steps of others; llguidance lets Python run meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mmv1.config import ModelConfig
from mmv1.errors import RequestError
from mmv1.types import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_MAX_GRAMMAR_BYTES = 1 << 18
_MAX_THREADS = 4
_PICTURE = re.compile(r"\s*(\d+ \|.*|\^*)\s*")
# A model that is lost in white space would write it until its last token: a space, or a line's end and an indentation, is enough.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ ]|\n[ \t]{0,24}"}


class Grammars:
    """Those of one model. The tokenizer is read when the first request needs it."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammar")  # of its own: running requests wait for masks
        self._masking = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="mask")
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    @classmethod
    def of_model(cls, model: ModelConfig) -> Grammars:
        return cls(Path(model.path), model.vocab_size, model.eos_token_ids)

    def check(self, asked: StructuredOutputs) -> Future[None]:
        """Done when the grammar is known to be good; fails with RequestError, which says what is wrong with it."""
        return self._compiling.submit(self._check, asked)

    def compile(self, asked: StructuredOutputs) -> Future[GrammarMatcher]:
        """A matcher for one answer. Fails with RequestError."""
        return self._compiling.submit(lambda: GrammarMatcher(self._compile(asked), self._masking))

    def _check(self, asked: StructuredOutputs) -> None:
        self._compile(asked)

    def _compile(self, asked: StructuredOutputs) -> LLMatcher:
        from llguidance import LLMatcher

        if not self._eos_token_ids:
            raise RequestError("this model has no end-of-sequence token, which a grammar needs", param=asked.param)
        matcher = LLMatcher(self._load_tokenizer(), _to_llguidance(asked), log_level=0)
        if matcher.is_error():
            raise _wrong(asked, _reason(matcher))
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                text = (self._model_dir / "tokenizer.json").read_text(encoding="utf-8")
                self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
            return self._tokenizer


class GrammarMatcher:
    """One answer's place in its grammar; see request.TokenMatcher. Once the grammar is complete, end-of-sequence alone may
    follow."""

    def __init__(self, matcher: LLMatcher, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._threads = threads
        self._mask: Future[bytes] = Future()
        self._mask.set_result(matcher.compute_bitmask())  # at once: the first takes longest, and nobody waits for it yet
        self.error = ""

    def mask(self) -> bytes:
        """Which tokens may follow. Waits for its being computed, which llguidance's limits keep short."""
        return self._mask.result()

    def advance(self, token_id: int) -> bool:
        """The token whose sampling the mask was for. A matcher that had to give up allows end-of-sequence; it says so here."""
        self._mask.result()  # a thread has the matcher until then
        if self._matcher.is_error() or not self._matcher.consume_token(token_id):
            self.error = _reason(self._matcher) or "the grammar does not allow the token that was sampled"
            return False
        self._mask = self._threads.submit(self._matcher.compute_bitmask)
        return True


def _to_llguidance(asked: StructuredOutputs) -> str:
    """The grammar as llguidance takes it. Raises RequestError."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        if asked.choice is not None:
            spelled = (json.dumps(each, ensure_ascii=False) for each in asked.choice)
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(spelled))
        elif asked.regex is not None:
            grammar = LLMatcher.grammar_from_regex(asked.regex)
        elif asked.grammar is not None:
            grammar = LLMatcher.grammar_from_lark(any_to_lark(asked.grammar))
        else:
            schema = {"type": "object"} if asked.json_object else asked.json
            text = schema if isinstance(schema, str) else json.dumps(schema)
            grammar = LLMatcher.grammar_from_json_schema(text, _JSON_OPTIONS)
    except Exception as error:  # conversions raise whatever they stumble over
        raise _wrong(asked, _one_line(str(error))) from None
    if len(grammar.encode()) > _MAX_GRAMMAR_BYTES:
        raise _wrong(asked, f"it has more than {_MAX_GRAMMAR_BYTES} bytes")
    return grammar


def _wrong(asked: StructuredOutputs, reason: str) -> RequestError:
    return RequestError(f"{asked.param} cannot be followed: {reason[:300]}", code="invalid_grammar", param=asked.param)


def _reason(matcher: LLMatcher) -> str:
    """What llguidance says is wrong, without its own state."""
    return _one_line(matcher.get_error().partition("<state>")[0])


def _one_line(text: str) -> str:
    """Without pictures of the place in the grammar."""
    return " ".join(line.strip() for line in text.splitlines() if not _PICTURE.fullmatch(line)).strip()
