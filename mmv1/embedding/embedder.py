"""Texts and pictures in, embeddings out: the embedding model as an event loop sees it.

Pictures are fetched, limited, named and processed as those of chats, by the same `Pictures`; what they become is kept by their
name. No picture is decoded or encoded twice, however many ask for it at once. The model's process is kept running: when one
ends, whoever waits for it gets an error, and another is started. Torch-free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmv1.config import PreprocessConfig
from mmv1.embedding.cache import EmbeddingCache
from mmv1.embedding.client import ClipProcess
from mmv1.embedding.messages import ClipReady
from mmv1.embedding.settings import FLAG, EmbeddingSettings
from mmv1.errors import ConfigError, EmbedderDeadError, RequestError, ShuttingDownError
from mmv1.log import logger
from mmv1.preprocess.crop import CropRules
from mmv1.preprocess.image_loader import all_at_once, is_remote
from mmv1.preprocess.media import EncodedImage, ImageSource
from mmv1.preprocess.pictures import Pictures, check_slab

# Of a request at once: pictures from the download on, for they are in memory, encoded; texts, so that others have their turn.
_MAX_PICTURES, _MAX_TEXTS = 8, 32
_FIRST_RESTART_S, _MAX_RESTART_S = 0.25, 30.0
_LONG_LIFE_S = 60.0
# What the slab is sized by, where only CLIP's pictures lie in it. How large they are is known when the model is loaded.
_LARGEST_BYTES, _ORDINARY_BYTES = 3 * 1024 * 1024, 3 * 224 * 224


class TextInput(NamedTuple):
    """`place`: where it stands in the request, for errors."""

    text: str
    place: str = "input"


class PictureInput(NamedTuple):
    source: ImageSource
    place: str = "input"


class Embedding(NamedTuple):
    """`values`: float32, little-endian, of length 1. `num_tokens`: as the model reads a text; 0 for a picture."""

    values: bytes
    num_tokens: int


@dataclass(slots=True)
class EmbeddingStats:
    """Counters since start, and gauges."""

    num_requests: int = 0
    num_texts: int = 0
    num_images: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    cache_bytes: int = 0
    cache_capacity_bytes: int = 0
    num_process_deaths: int = 0


@dataclass(eq=False, slots=True)
class _Flight:
    """A picture on its way to its embedding. It is given up when nobody waits for it, unless its pixels are being read."""

    task: asyncio.Task[bytes]
    num_waiting: int = 0
    may_be_given_up: bool = True


class Embedder:
    """One event loop; `start` and `wait_ready` before anything else, `close` at the end.

    `pictures`: those of the language model beside, which starts and ends them; None: its own, made of `config`, where there is no
    such model or it takes no pictures.
    """

    def __init__(self, settings: EmbeddingSettings, config: PreprocessConfig, pictures: Pictures | None = None) -> None:
        self.model = settings.model
        self.name = settings.name
        self.config = config
        self._has_own_pictures = pictures is None
        self.pictures = pictures or Pictures(
            config,
            lambda message: None,  # there is no core
            largest_bytes=_LARGEST_BYTES,
            ordinary_bytes=_ORDINARY_BYTES,
            on_failure=self._pictures_failed,
        )
        self._process: ClipProcess | None = None  # one that can embed
        self._supervision: asyncio.Task[None] | None = None
        self._cache = EmbeddingCache(settings.cache_bytes)
        self._flights: dict[bytes, _Flight] = {}
        self._requests: set[asyncio.Future[list[Embedding]]] = set()
        self._is_ending = False
        self.ready: ClipReady | None = None
        self._stats = EmbeddingStats()
        self.is_alive = True  # False: pictures can no longer be processed, for good

    async def start(self) -> None:
        """Start the process, and the pool where it is not another's; the model is loaded meanwhile."""
        self._first: asyncio.Future[ClipReady] = asyncio.get_running_loop().create_future()
        if self._has_own_pictures:
            await self.pictures.start()
        self._supervision = asyncio.create_task(self._keep_running())

    async def wait_ready(self) -> ClipReady:
        """Raises ConfigError where the model cannot be loaded or its pictures do not fit the slab."""
        ready = await asyncio.shield(self._first)
        if self._has_own_pictures:
            await self.pictures.wait_ready()
        return ready

    async def close(self) -> None:
        self.end_requests()
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        flights = [flight.task for flight in self._flights.values()]
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        if self._has_own_pictures:
            await self.pictures.close()

    def check_health(self) -> None:
        """Raises EmbedderDeadError unless there is a process that can embed, and a pool."""
        self._running()

    def end_requests(self) -> None:
        """End every request that runs, with ShuttingDownError."""
        self._is_ending = True
        for request in self._requests:
            request.cancel()

    def stats(self) -> EmbeddingStats:
        self._stats.cache_bytes = self._cache.num_bytes
        self._stats.cache_capacity_bytes = self._cache.capacity_bytes
        return self._stats

    async def embed(
        self, inputs: Sequence[TextInput | PictureInput], *, truncate: bool = False, tenant_scope: bytes = b""
    ) -> list[Embedding]:
        """One for each. `truncate`: a text is read as far as the model's context goes, and not refused. Nothing is downloaded for
        a request that is refused for its texts or for the pictures that came with it. Raises RequestError (ImageError,
        ContextLengthError), EmbedderDeadError, ShuttingDownError."""
        request = asyncio.ensure_future(self._embed_all(inputs, truncate, tenant_scope))
        self._requests.add(request)
        try:
            embeddings = await request
        except asyncio.CancelledError:
            if self._is_ending:
                raise ShuttingDownError("the server is shutting down") from None
            raise
        finally:
            self._requests.discard(request)
        self._stats.num_requests += 1
        return embeddings

    async def _embed_all(
        self, inputs: Sequence[TextInput | PictureInput], truncate: bool, tenant_scope: bytes
    ) -> list[Embedding]:
        picture_turns, text_turns = asyncio.Semaphore(_MAX_PICTURES), asyncio.Semaphore(_MAX_TEXTS)

        async def embed_one(one: TextInput | PictureInput) -> Embedding:
            try:
                if isinstance(one, PictureInput):
                    async with picture_turns:
                        return Embedding(await self._embed_picture(one.source, tenant_scope), 0)
                async with text_turns:
                    embedded = await self._running().embed_text(one.text, truncate=truncate)
            except RequestError as error:  # perhaps one that others get too
                message = f"{one.place}: {error.message}"
                raise RequestError(message, code=error.code, param=one.place, status=error.status) from None
            self._stats.num_texts += 1
            return Embedding(embedded.values, embedded.num_tokens)

        remote = {number: one for number, one in enumerate(inputs) if isinstance(one, PictureInput) and is_remote(one.source)}
        here = {number: one for number, one in enumerate(inputs) if number not in remote}
        found: dict[int, Embedding] = {}
        for group in (here, remote):
            found |= await all_at_once(embed_one, group, of=1)
        return [found[number] for number in range(len(inputs))]

    def _running(self) -> ClipProcess:
        if self._process is None or not self.is_alive:
            raise EmbedderDeadError("the embedding model's process is not running")
        return self._process

    async def _embed_picture(self, source: ImageSource, tenant_scope: bytes) -> bytes:
        self._running()  # before anything is downloaded
        loader = self.pictures.loader
        image = (await (loader.download if is_remote(source) else loader.read_local)([source]))[0]
        assert self.ready is not None
        rules = self.ready.rules
        mm_hash = await self.pictures.mm_hash(image, rules.fingerprint(), tenant_scope)
        self._stats.cache_queries += 1
        while (flight := self._flights.get(mm_hash)) is not None and flight.task.cancelling():
            await asyncio.wait((flight.task,))
        if flight is None and (values := self._cache.get(mm_hash)) is not None:
            self._stats.cache_hits += 1
            return values
        if flight is None:
            flight = self._flights[mm_hash] = _Flight(asyncio.create_task(self._fly(mm_hash, image, rules)))
        else:
            self._stats.cache_hits += 1
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and flight.may_be_given_up:
                flight.task.cancel()

    async def _fly(self, mm_hash: bytes, image: EncodedImage, rules: CropRules) -> bytes:
        """Have the picture processed and encoded."""
        pixels = self.pictures.pixels
        pixels.add_reference(mm_hash, image, rules.place(), rules)
        try:
            offset, _ = await pixels.hold(mm_hash)
            self._flights[mm_hash].may_be_given_up = False
            try:
                if self.ready is None or self.ready.rules != rules:  # another model has been loaded meanwhile
                    raise EmbedderDeadError("the embedding model has changed")
                embedded = await self._running().embed_pixels(offset)
            finally:
                pixels.release(mm_hash)
        finally:
            pixels.drop_reference(mm_hash)
            del self._flights[mm_hash]
        self._stats.num_images += 1
        self._cache.put(mm_hash, embedded.values)
        return embedded.values

    async def _keep_running(self) -> None:
        """Start the process, and another whenever it ends; not if the first cannot load the model. Those that do not live long
        come ever more slowly."""
        pause = _FIRST_RESTART_S
        while True:
            started_at = asyncio.get_running_loop().time()
            try:
                await self._run_process()
            except Exception as error:
                if not self._first.done():
                    self._first.set_exception(error)
                    return
                logger.error("%s", error, exc_info=None if isinstance(error, ConfigError) else error)
            lived_s = asyncio.get_running_loop().time() - started_at
            pause = _FIRST_RESTART_S if lived_s > _LONG_LIFE_S else min(2 * pause, _MAX_RESTART_S)
            self._stats.num_process_deaths += 1
            self._cache.clear()  # what its files hold may be another model by now
            logger.info("The embedding model is loaded anew in %.1f s", pause)
            await asyncio.sleep(pause)

    async def _run_process(self) -> None:
        """One process, from its start to its end. Raises ConfigError, and whatever keeps a process from being started."""
        process = ClipProcess(self.model, flag=FLAG, slab=self.pictures.slab)
        await process.start()
        try:
            ready = await process.wait_ready()
            check_slab(self.pictures.slab.nbytes, ready.rules.place().nbytes)
            self.ready, self._process = ready, process
            if not self._first.done():
                self._first.set_result(ready)
            status = await process.wait_ended()
            logger.error("The embedding model's process ended (%d)", status)
        finally:
            self._process = None
            await process.close()

    def _pictures_failed(self, reason: str) -> None:
        """Called from any thread."""
        logger.error("Pictures cannot be processed any more: %s", reason)
        self.is_alive = False
