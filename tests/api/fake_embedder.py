"""An Embedder without a model: the same face, embeddings that say what was asked, and a record of it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from types import SimpleNamespace

from mmv1.config import EngineArgs, resolve_preprocess
from mmv1.embedding.embedder import Embedding, EmbeddingStats, PictureInput, TextInput
from mmv1.embedding.messages import ClipReady
from mmv1.errors import EmbedderDeadError, ShuttingDownError
from mmv1.preprocess.crop import CropRules
from mmv1.preprocess.pictures import PreprocessStats
from mmv1.preprocess.timings import StageTimings

EMBEDDING_MODEL = "fake-clip"


class FakeEmbedder:
    """A text becomes (length, 0.1), a picture (-1, 0.1). `error` is raised; else an answer waits for `resume`, set at first."""

    def __init__(self) -> None:
        self.name, self.model = EMBEDDING_MODEL, "fake-clip:weights"
        self.ready = ClipReady(rules=CropRules(height=32, width=32), dimensions=2, context_length=77, device="cpu")
        self.config = resolve_preprocess(EngineArgs())
        self.pictures = SimpleNamespace(stats=PreprocessStats, timings=StageTimings())
        self.is_alive = True
        self.is_healthy = True
        self.resume = asyncio.Event()
        self.resume.set()
        self.error: Exception | None = None
        self.asked: list[tuple[list[TextInput | PictureInput], bool, bytes]] = []
        self.num_cancelled = 0

    async def embed(
        self, inputs: Sequence[TextInput | PictureInput], *, truncate: bool = False, tenant_scope: bytes = b""
    ) -> list[Embedding]:
        self.asked.append((list(inputs), truncate, tenant_scope))
        try:
            await self.resume.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [
            Embedding(struct.pack("<2f", len(one.text), 0.1), len(one.text) + 2)
            if isinstance(one, TextInput) else Embedding(struct.pack("<2f", -1, 0.1), 0)
            for one in inputs
        ]  # fmt: skip

    def check_health(self) -> None:
        if not self.is_healthy:
            raise EmbedderDeadError("process 4711 is gone")

    def end_requests(self) -> None:
        self.error = ShuttingDownError("the server is shutting down")
        self.resume.set()

    def stats(self) -> EmbeddingStats:
        return EmbeddingStats(
            num_requests=1, num_texts=2, num_images=3, cache_queries=5, cache_hits=4, cache_bytes=600, cache_capacity_bytes=700,
            num_process_deaths=8,
        )  # fmt: skip
