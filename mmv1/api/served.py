"""What a server answers with: a language model, an embedding model, or both; and what does not depend on which."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mmv1.api.metrics import Metrics
from mmv1.api.protocol import ModelCard
from mmv1.api.statistics import name_of_kv_cache
from mmv1.config import PreprocessConfig
from mmv1.embedding.embedder import Embedder
from mmv1.log import logger
from mmv1.preprocess.pictures import Pictures
from mmv1.types import SchedulerStats

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM
    from mmv1.preprocess.preprocessor import Preprocessor


class Served(NamedTuple):
    """At least one of the two. Where both take pictures, they share what processes them."""

    llm: AsyncLLM | None
    embedder: Embedder | None

    @property
    def pictures(self) -> Preprocessor | Pictures:
        return self.embedder.pictures if self.embedder is not None else self._llm.preprocessor

    @property
    def preprocess(self) -> PreprocessConfig:
        return self.llm.config.preprocess if self.llm is not None else self._only_embedder.config

    @property
    def _llm(self) -> AsyncLLM:
        assert self.llm is not None
        return self.llm

    @property
    def _only_embedder(self) -> Embedder:
        assert self.embedder is not None
        return self.embedder

    @property
    def is_ready(self) -> bool:
        """False: it can answer nothing any more. A process of the embedding model that ended is replaced."""
        return (self.llm is None or self.llm.is_ready) and (self.embedder is None or self.embedder.is_alive)

    async def check_health(self) -> None:
        """Raises EngineDeadError, EmbedderDeadError. Beside a language model an embedding model that is away for a moment, loaded
        anew, is no reason to have the server replaced."""
        if self.llm is not None:
            await self.llm.check_health()
        else:
            self._only_embedder.check_health()

    def end_requests(self) -> None:
        """End every request that runs, with ShuttingDownError."""
        for each in (self.llm, self.embedder):
            if each is not None:
                each.end_requests()

    def cards(self) -> list[ModelCard]:
        """The language model's first."""
        cards = []
        now = int(time.time())
        if self.llm is not None:
            model = self.llm.config.model
            cards.append(
                ModelCard(id=model.served_model_name, created=now, root=model.path, max_model_len=self.llm.max_model_len)
            )
        if self.embedder is not None and self.embedder.ready is not None:
            length = self.embedder.ready.context_length
            cards.append(ModelCard(id=self.embedder.name, created=now, root=self.embedder.model, max_model_len=length))
        return cards

    def metrics(self) -> Metrics:
        read_stats: Callable[[], SchedulerStats] = SchedulerStats if self.llm is None else self.llm.stats
        name = self._only_embedder.name if self.llm is None else self.llm.config.model.served_model_name
        return Metrics(name, read_stats, self.pictures.stats, self.pictures.timings, self.embedder)

    def log_start(self) -> None:
        if self.llm is not None:
            _log_engine(self.llm)
        if self.embedder is not None and self.embedder.ready is not None:
            ready = self.embedder.ready
            size = f"{ready.dimensions} numbers, pictures of {ready.rules.width} x {ready.rules.height} pixels"
            logger.info("Embedding model: %s, float32 on %s: %s", self.embedder.name, ready.device, size)
        stats = self.pictures.stats()
        redis = "yes" if self.preprocess.redis_url else "no"
        logger.info("Preprocess workers: %d, slab: %.1f MiB, Redis: %s", stats.num_workers, stats.slab_bytes / (1 << 20), redis)


def _log_engine(llm: AsyncLLM) -> None:
    model, ready = llm.config.model, llm.ready
    if ready is None:
        return
    num_tokens = ready.num_kv_blocks * ready.block_size
    logger.info("Model: %s (%s), %s on %s", model.served_model_name, model.architecture, ready.dtype, ready.device)
    logger.info("Attention backend: %s", ready.attention_backend)
    blocks = f"{ready.num_kv_blocks} blocks of {ready.block_size} tokens"
    logger.info("%s size: %s tokens (%s)", name_of_kv_cache(ready.device), f"{num_tokens:,}", blocks)
    concurrency = num_tokens / ready.max_model_len
    logger.info("Maximum concurrency for %s tokens per request: %.2fx", f"{ready.max_model_len:,}", concurrency)
    logger.info("Encoder cache size: %.1f MiB", ready.encoder_cache_bytes / (1 << 20))
