"""For tests of a running engine: its event loop, its caches, its counters, and how answers are compared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from mmv1.engine.llm import LLM, _conversation
from mmv1.engine.output_processor import CompletionOutput, RequestOutput
from mmv1.types import SamplingParams, SchedulerStats

T = TypeVar("T")


def greedy(max_tokens: int = 12, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)


def run_inside(llm: LLM, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
    """Run a coroutine that uses `llm.engine` on the event loop that it lives on."""
    return asyncio.run_coroutine_threadsafe(work, llm.engine._loop).result(timeout_s)


def forget_caches(llm: LLM) -> None:
    """Empty the prefix cache and the encoder cache; returns when it has happened."""

    async def reset() -> None:
        llm.engine.reset_caches()
        await llm.engine.refresh_stats()  # messages are taken in order

    run_inside(llm, reset())


def deltas_of(
    llm: LLM, messages: Sequence[dict[str, Any]], params: SamplingParams, **options: Any
) -> AsyncGenerator[RequestOutput, None]:
    """One answer as a server reads it; for use inside."""
    return llm.engine.generate(_conversation(messages), params, **options)


async def all_deltas_of(
    llm: LLM, messages: Sequence[dict[str, Any]], params: SamplingParams, **options: Any
) -> list[RequestOutput]:
    return [delta async for delta in deltas_of(llm, messages, params, **options)]


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
