"""For tests of a running engine: its event loop, its caches, its counters, and how answers are compared with each other and with
transformers'."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from mmv1.config import EngineConfig
from mmv1.engine import async_llm
from mmv1.engine.client import EngineClient
from mmv1.engine.core_process import build_core
from mmv1.engine.llm import LLM, _conversation
from mmv1.engine.output_processor import CompletionOutput, RequestOutput
from mmv1.types import EngineCoreInput, EngineReady, SamplingParams, SchedulerStats
from tests.oracle import OracleAnswer

T = TypeVar("T")

TOLERANCE = 1e-4  # of logits and log-probabilities in float32


class ClientOfThread(EngineClient):
    """In the place of `EngineClient`: the core on a thread of this process, where torch is imported already, so that it starts at
    once."""

    async def start(self, config: EngineConfig, slab_fd: int) -> EngineReady:
        loop = asyncio.get_running_loop()
        output: Any = SimpleNamespace(put=lambda message: loop.call_soon_threadsafe(self._take_outputs, message))
        self._core, ready = await asyncio.to_thread(build_core, config, slab_fd, output)
        self._thread = threading.Thread(target=self._core.run, daemon=True)
        self._thread.start()
        return ready

    def send(self, message: EngineCoreInput) -> None:
        self._core.post(message)

    async def close(self) -> None:
        self._core.stop()
        await asyncio.to_thread(self._thread.join)


def start_here(model_dir: Path, settings: Sequence[dict[str, Any]]) -> list[LLM]:
    """An engine of each of the settings, in this process but for the pool's."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as threads:
        patch.setattr(async_llm, "EngineClient", ClientOfThread)
        return list(threads.map(lambda args: LLM(model_dir, **args), settings))


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


def assert_same_tokens(token_ids: list[int], reference: OracleAnswer, name: str) -> None:
    """The same tokens; only where the reference's two best logits are within the tolerance may it be the other of the two, and
    what follows is then another answer."""
    for step, (mine, theirs) in enumerate(zip(token_ids, reference.token_ids, strict=False)):
        if mine != theirs:
            best, second = reference.logits[step].topk(2).values.tolist()
            is_tie = best - second < TOLERANCE and mine == int(reference.logits[step].topk(2).indices[1])
            assert is_tie, f"{name}: token {step} is {mine}, not {theirs}, which is better by {best - second}"
            return
    assert len(token_ids) == len(reference.token_ids), name


def assert_same_logprobs(output: CompletionOutput, token_ids: torch.Tensor, logprobs: torch.Tensor, name: str) -> None:
    """What the first token was chosen from has these tokens with these log-probabilities."""
    (first, *_) = output.logprobs or []
    mine = {top.token_id: top.logprob for top in first.top}
    theirs = dict(zip(token_ids.tolist(), logprobs.tolist(), strict=True))
    assert len(mine) == len(theirs), name
    least = min(mine.values())  # the last of the likeliest may be another one, if as likely
    worst = max(abs(mine.get(token_id, least) - logprob) for token_id, logprob in theirs.items())
    assert worst < TOLERANCE, f"{name}: off by {worst}"
