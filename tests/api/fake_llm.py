"""An AsyncLLM without an engine: the same face, scripted answers, and a record of what was asked and what was aborted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx

from mmv1.api.server import create_app
from mmv1.api.settings import ServerSettings
from mmv1.config import EngineArgs, resolve
from mmv1.engine.output_processor import CompletionOutput, PositionLogprobs, RequestOutput, TokenLogprob
from mmv1.errors import EngineDeadError, ShuttingDownError
from mmv1.preprocess.pictures import PreprocessStats
from mmv1.preprocess.prompt import Message
from mmv1.preprocess.timings import StageTimings
from mmv1.types import EngineReady, SamplingParams, SchedulerStats
from tests.api.fake_embedder import FakeEmbedder

MODEL = "fake-model"
PIECES = ("Hello", ", ", "wörld 😀", "!")


def make_model_dir(directory: Path, **generation_config: object) -> Path:
    """As little as a server reads of a model directory."""
    config = {"architectures": ["Fake"], "max_position_embeddings": 128, "vocab_size": 100, "eos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation_config))
    return directory


class FakeLLM:
    """Answers with `pieces`, one token each. `pause_before` piece i waits for `resume`; `fail_before` piece i raises `error`."""

    def __init__(self, model_dir: Path, pieces: tuple[str, ...] = PIECES) -> None:
        self.config = resolve(EngineArgs(model=str(model_dir), served_model_name=MODEL))
        self.preprocess_stats = PreprocessStats(num_decodes=3, num_slab_hits=2, slab_bytes=100)
        self.preprocessor = SimpleNamespace(stats=lambda: self.preprocess_stats, timings=StageTimings())
        self.ready = EngineReady(
            max_model_len=128, num_kv_blocks=10, block_size=16, encoder_cache_bytes=1 << 20, attention_backend="sdpa",
            device="cpu", dtype="float32",
        )  # fmt: skip
        self.max_model_len = 128
        self.finish_reason = "length"
        self.scheduler_stats = SchedulerStats(num_kv_blocks=10, num_kv_blocks_used=5, num_generation_tokens=7, num_steps=1)
        self.is_ready = True
        self.pieces = pieces
        self.pause_before: int | None = None
        self.resume = asyncio.Event()
        self.fail_before: int | None = None
        self.error: Exception = EngineDeadError("engine process 4711 at 0xdeadbeef is gone")
        self.asked: list[tuple[list[Message], SamplingParams, dict[str, object]]] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []

    async def generate(
        self, prompt: list[Message], sampling_params: SamplingParams, *, request_id: str, **options: object
    ) -> AsyncIterator[RequestOutput]:
        self.asked.append((prompt, sampling_params, options))
        self.running.add(request_id)
        finished = False
        try:
            for i, piece in enumerate(self.pieces):
                if i == self.pause_before:
                    await self.resume.wait()
                if i == self.fail_before:
                    raise self.error
                last = i == len(self.pieces) - 1
                outputs = [self._news(index, i, piece, last, sampling_params) for index in range(sampling_params.n)]
                yield RequestOutput(request_id, outputs, 5, 4 if i == 0 else 0, finished=last, num_image_tokens=3)
                await asyncio.sleep(0)
            finished = True
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    def _news(self, index: int, i: int, piece: str, last: bool, params: SamplingParams) -> CompletionOutput:
        logprobs = None
        if params.logprobs is not None:
            top = [TokenLogprob(k, f"t{k}", b"t%d" % k, -float(k)) for k in range(params.logprobs)]
            logprobs = [PositionLogprobs(TokenLogprob(i, piece, piece.encode(), -0.5), 1, top)]
        return CompletionOutput(index, piece, [i], logprobs, self.finish_reason if last else None, None)

    def end_requests(self) -> None:
        """As AsyncLLM's: what waits in `pause_before` ends with an error."""
        self.fail_before, self.error = self.pause_before, ShuttingDownError("the server is shutting down")
        self.resume.set()

    async def check_health(self) -> None:
        if not self.is_ready:
            raise self.error

    def stats(self) -> SchedulerStats:
        return self.scheduler_stats


def client_of(llm: FakeLLM | None, embedder: FakeEmbedder | None = None, **settings: object) -> httpx.AsyncClient:
    """In this process, without a socket."""
    app = create_app(llm, ServerSettings(**settings), embedder=embedder)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
