"""Engines for tests: started once for each group of settings, and a way to talk to the AsyncLLM inside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmv1.engine.llm import LLM, _conversation
from mmv1.engine.output_processor import CompletionOutput, RequestOutput
from mmv1.types import SamplingParams, SchedulerStats

T = TypeVar("T")


def greedy(max_tokens: int = 12, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


class Engines(contextlib.ExitStack):
    """Starting one takes seconds, so tests with the same settings share one. All end with the context."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__()
        self._model_dir = model_dir
        self._started: dict[str, LLM] = {}

    def get(self, **settings: Any) -> LLM:
        key = repr(sorted(settings.items()))
        if key not in self._started:
            self._started[key] = self.enter_context(LLM(self._model_dir, **settings))
        return self._started[key]


def run_inside(llm: LLM, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
    """Run a coroutine that uses `llm.engine` on the event loop that it lives on."""
    return asyncio.run_coroutine_threadsafe(work, llm.engine._loop).result(timeout_s)


def forget_caches(llm: LLM) -> None:
    """Empty the prefix cache and the encoder cache; returns when it has happened."""

    async def reset() -> None:
        llm.engine.reset_caches()
        await llm.engine.refresh_stats()  # messages are taken in order

    run_inside(llm, reset())


async def stream(llm: LLM, messages: Sequence[dict[str, Any]], params: SamplingParams, **options: Any) -> list[RequestOutput]:
    """The deltas of one answer, as a server reads them; for `run_inside`."""
    return [delta async for delta in llm.engine.generate(_conversation(messages), params, **options)]


class Counters:
    """What has been counted since this was made: `counters.num_images_encoded`, of the engine or of the preprocessor."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        engine: SchedulerStats = self._llm.stats()
        preprocess = self._llm.engine.preprocessor.stats()
        names = [*engine.__struct_fields__], [*preprocess.__dataclass_fields__]
        return {name: getattr(of, name) for of, listed in zip((engine, preprocess), names, strict=True) for name in listed}

    def __getattr__(self, name: str) -> float:
        return self._read()[name] - self._before[name]


def tokens(answers: Sequence[RequestOutput]) -> list[list[int]]:
    """The token ids of answers with n = 1."""
    return [answer.outputs[0].token_ids for answer in answers]


def assert_same_answer(got: CompletionOutput, expected: CompletionOutput, what: object) -> None:
    """The same text and tokens, and log-probabilities within 1e-4: of the sampled tokens and of the k most likely, in order of
    likelihood (which of two equally likely tokens comes first is left open)."""
    assert got.token_ids == expected.token_ids, what
    assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason), what
    assert (got.logprobs is None) == (expected.logprobs is None), what
    for step, (mine, theirs) in enumerate(zip(got.logprobs or (), expected.logprobs or (), strict=True)):
        mine_all = [mine.sampled.logprob, *(top.logprob for top in mine.top)]
        theirs_all = [theirs.sampled.logprob, *(top.logprob for top in theirs.top)]
        worst = max(abs(a - b) for a, b in zip(mine_all, theirs_all, strict=True))
        assert worst < 1e-4, f"{what}: token {step}: log-probabilities differ by {worst}"
