"""Pixels by hash: answers the core's PixelRequests, and whoever asks in this process, from the slab, the shared store or the
pool, each picture's work done once.

The order slab -> store -> pool stands in `request` and `_fill`. One event loop, one owner: the ledger, the tickets and the jobs
all live here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from mmv1.errors import EngineError, ImageError
from mmv1.log import logger
from mmv1.preprocess.crop import CropRules
from mmv1.preprocess.layout import ImagePlace
from mmv1.preprocess.media import EncodedImage
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.pool_messages import CropJob, DecodeJob, PatchJob
from mmv1.preprocess.slab import SlabLedger
from mmv1.preprocess.store import SharedStore
from mmv1.preprocess.timings import StageTimings
from mmv1.types import FeatureFailed, FeatureReady, PixelRequest, SlabShort

SendFeature = Callable[[FeatureReady | FeatureFailed | SlabShort], None]

_INTERNAL_ERROR = "internal_error"  # code of a FeatureFailed that is no fault of the picture
_CLOSING_PATIENCE_S = 1.0
_PATIENCE_S = 0.2  # a picture waits so long for room in the slab before the core is told


@dataclass(frozen=True, slots=True)
class PatchRules:
    """How the model's family cuts pictures up; the same for every picture."""

    patch_size: int
    merge_size: int
    resample: str


@dataclass(eq=False, slots=True)
class _Picture:
    image: EncodedImage
    place: ImagePlace
    rules: PatchRules | CropRules
    num_references: int = 0

    def job(self, job_id: int, offset: int) -> DecodeJob:
        """Its work for the pool, which writes at `offset` of the slab."""
        place, rules = self.place, self.rules
        if isinstance(rules, CropRules):
            return CropJob(job_id=job_id, header=self.image.header, rules=rules, offset=offset, nbytes=place.nbytes)
        return PatchJob(
            job_id=job_id,
            header=self.image.header,
            resized_height=place.resized_height,
            resized_width=place.resized_width,
            patch_size=rules.patch_size,
            merge_size=rules.merge_size,
            resample=rules.resample,
            offset=offset,
            nbytes=place.nbytes,
        )


@dataclass(eq=False, slots=True)
class _Job:
    """One picture on its way into the slab: waiting for a slot (no task yet), then for the store, for a worker, with one."""

    job_id: int
    picture: _Picture
    started: float
    task: asyncio.Task[None] | None = None


class _UnwantedError(Exception):
    """The core released the picture before a worker had it."""


class PixelService:
    """What the core holds or awaits, and the work that follows from it.

    For the core a picture is in one of three states: nothing; awaited, with the ticket of the newest request; held, its slot
    pinned once for the core however often it was asked for. `release` ends both. A job pins its slot too, so that a worker
    never writes where something else lies, whatever the core has decided meanwhile; and so does a picture that is being kept
    in the store. `store` None: there is none. `hold` is the core's place taken by somebody in this process; a picture that one
    of the two asks for is never asked for by the other, for their rules, and so their hashes, differ.
    """

    def __init__(
        self,
        *,
        ledger: SlabLedger,
        pool: PreprocessPool,
        store: SharedStore | None,
        timings: StageTimings,
        send: SendFeature,
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self._store = store
        self._timings = timings
        self._send_to_core = send
        self._holders: dict[bytes, asyncio.Future[tuple[int, int]]] = {}  # who waits in `hold`
        self._pictures: dict[bytes, _Picture] = {}
        self._awaited: dict[bytes, int] = {}  # mm_hash -> ticket
        self._held: dict[bytes, tuple[int, int]] = {}  # mm_hash -> (offset, nbytes)
        self._jobs: dict[bytes, _Job] = {}
        self._next_job_id = 0
        self._pressing: asyncio.Task[None] | None = None
        self._saves: set[asyncio.Task[None]] = set()
        self.num_slab_hits = 0
        self.num_store_hits = 0
        self.num_decodes = 0
        self.num_failures = 0

    @property
    def encoded_bytes(self) -> int:
        """Encoded bytes kept for live requests."""
        return sum(len(picture.image.data) for picture in self._pictures.values())

    @property
    def num_jobs(self) -> int:
        """Pictures on their way into the slab."""
        return len(self._jobs)

    def add_reference(
        self, mm_hash: bytes, image: EncodedImage, place: ImagePlace, rules: PatchRules | CropRules
    ) -> None:
        """Keep a picture's encoded bytes as long as somebody refers to it: its pixels may be asked for at any time."""
        self._pictures.setdefault(mm_hash, _Picture(image, place, rules)).num_references += 1

    def drop_reference(self, mm_hash: bytes) -> None:
        picture = self._pictures[mm_hash]
        picture.num_references -= 1
        if not picture.num_references:
            del self._pictures[mm_hash]

    def request(self, request: PixelRequest) -> None:
        """Answer with FeatureReady or FeatureFailed, now or when the work is done; not at all if released before."""
        mm_hash, ticket = request.mm_hash, request.ticket
        if mm_hash in self._jobs:
            self._awaited[mm_hash] = ticket
            return
        if mm_hash not in self._held:
            slot = self._ledger.pin(mm_hash)
            if slot is not None:
                self.num_slab_hits += 1
                self._held[mm_hash] = slot
        if mm_hash in self._held:
            self._send(FeatureReady(mm_hash, ticket, *self._held[mm_hash]))
            return
        picture = self._pictures.get(mm_hash)
        if picture is None:
            self._send(FeatureFailed(mm_hash, ticket, "the image is gone: its request has ended", "invalid_image"))
            return
        self._awaited[mm_hash] = ticket
        self._start_job(mm_hash, picture)

    async def hold(self, mm_hash: bytes) -> tuple[int, int]:
        """For somebody in this process: where the pixels lie, (offset, nbytes), pinned until `release`. One at a time for each
        picture, which must be referred to. Cancelled, nothing is held. Raises ImageError, EngineError."""
        answer = self._holders[mm_hash] = asyncio.get_running_loop().create_future()
        try:
            self.request(PixelRequest(mm_hash, ticket=0))
            return await answer
        except asyncio.CancelledError:
            self.release(mm_hash)
            raise
        finally:
            del self._holders[mm_hash]

    def _send(self, message: FeatureReady | FeatureFailed | SlabShort) -> None:
        """To the core, unless it is the answer to somebody here."""
        if isinstance(message, SlabShort) or (answer := self._holders.get(message.mm_hash)) is None:
            self._send_to_core(message)
        elif answer.done():  # cancelled just now; `hold` releases what it was to get
            return
        elif isinstance(message, FeatureReady):
            answer.set_result((message.offset, message.nbytes))
        elif message.code == _INTERNAL_ERROR:
            answer.set_exception(EngineError(message.message))
        else:
            answer.set_exception(ImageError(message.message, code=message.code))

    def release(self, mm_hash: bytes) -> None:
        """The core no longer holds or awaits this picture. A job no worker has yet is withdrawn; one that a worker has runs
        on, and what it makes stays in the slab for the next request; one that is being looked up ends with its look-up, unless
        the picture is found. Unknown hashes are ignored."""
        self._awaited.pop(mm_hash, None)
        job = self._jobs.get(mm_hash)
        if self._held.pop(mm_hash, None) is not None:
            self._ledger.unpin(mm_hash)
        elif job is not None and job.task is None:
            self._ledger.withdraw(mm_hash)
            del self._jobs[mm_hash]
        elif job is not None and self._pool.withdraw(job.job_id):
            self._ledger.discard(mm_hash)
            del self._jobs[mm_hash]
        else:
            return
        self._admit()

    async def close(self) -> None:
        """Pictures that are being kept are, unless that takes long; all else ends at once."""
        if self._saves:
            await asyncio.wait(self._saves, timeout=_CLOSING_PATIENCE_S)
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        tasks += [self._pressing] if self._pressing is not None else []
        tasks += self._saves
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_job(self, mm_hash: bytes, picture: _Picture) -> None:
        job = self._jobs[mm_hash] = _Job(self._next_job_id, picture, time.perf_counter())
        self._next_job_id += 1
        offset = self._ledger.allocate(mm_hash, picture.place.nbytes)
        if offset is not None:
            job.task = asyncio.create_task(self._produce(mm_hash, job, offset))
        elif self._pressing is None or self._pressing.done():
            self._pressing = asyncio.create_task(self._press())

    async def _press(self) -> None:
        """Tell the core while one picture keeps waiting for room: the slab may be full of pictures that wait, in the end, for
        that one, and only the core knows what is less urgent."""
        while (first := self._ledger.next_waiting) is not None:
            await asyncio.sleep(_PATIENCE_S)
            if self._ledger.next_waiting == first:
                self._send(SlabShort())

    def _admit(self) -> None:
        """Start the jobs whose turn for a slot has come."""
        for mm_hash, offset in self._ledger.admit():
            job = self._jobs[mm_hash]
            job.task = asyncio.create_task(self._produce(mm_hash, job, offset))

    async def _produce(self, mm_hash: bytes, job: _Job, offset: int) -> None:
        """Have the patches written at `offset`, and answer whoever still waits. A withdrawn job ends here by cancellation."""
        self._timings.observe("slab", time.perf_counter() - job.started)
        try:
            is_new = await self._fill(mm_hash, job, offset)
        except _UnwantedError:
            del self._jobs[mm_hash]
            self._ledger.discard(mm_hash)
            self._admit()
        except ImageError as error:
            self._failed(mm_hash, error.message, error.code)
        except Exception as error:
            if not isinstance(error, EngineError):  # the pool has ended, and has said so
                logger.exception("Having a picture processed failed")
            self._failed(mm_hash, "the image could not be processed: the server is failing", _INTERNAL_ERROR)
        else:
            if is_new:
                self._keep(mm_hash, job.picture, offset)
            self._ready(mm_hash, offset, job.picture.place.nbytes)

    async def _fill(self, mm_hash: bytes, job: _Job, offset: int) -> bool:
        """The patches from the store, else from the pool: whether they are new to the store. Raises ImageError, EngineError;
        _UnwantedError when the core no longer wants them and nothing has been done yet."""
        store = self._store_for(job.picture)
        if store is not None:
            started = time.perf_counter()
            found = await store.load(mm_hash, job.picture.place, offset, lambda: mm_hash in self._awaited)
            self._timings.observe("store_get", time.perf_counter() - started)
            if found:
                self.num_store_hits += 1
                return False
            if mm_hash not in self._awaited:  # released meanwhile
                store.drop_lease(mm_hash)
                raise _UnwantedError
        try:
            times = await self._pool.submit(job.picture.job(job.job_id, offset), job.picture.image.data)
        except BaseException:  # a withdrawal's cancellation too
            if store is not None:
                store.drop_lease(mm_hash)
            raise
        self.num_decodes += 1
        self._timings.observe("queue", times.queue_s)
        self._timings.observe("decode", times.decode_s)
        self._timings.observe("resize", times.resize_s)
        return store is not None

    def _store_for(self, picture: _Picture) -> SharedStore | None:
        num_pixels = picture.image.header.width * picture.image.header.height
        return self._store if self._store is not None and self._store.takes(num_pixels, picture.place) else None

    def _keep(self, mm_hash: bytes, picture: _Picture, offset: int) -> None:
        """Put a new picture into the store, behind the answer and with a pin of its own; not while the slab is short of room."""
        store = self._store_for(picture)
        if store is None:
            return
        if self._ledger.num_waiting or not store.may_save():
            store.drop_lease(mm_hash)
            return
        self._ledger.pin(mm_hash)

        async def save() -> None:
            started = time.perf_counter()
            await store.save(mm_hash, picture.place, offset)
            self._timings.observe("store_set", time.perf_counter() - started)
            self._ledger.unpin(mm_hash)
            self._admit()

        task = asyncio.create_task(save())
        self._saves.add(task)
        task.add_done_callback(self._saves.discard)

    def _ready(self, mm_hash: bytes, offset: int, nbytes: int) -> None:
        del self._jobs[mm_hash]
        ticket = self._awaited.pop(mm_hash, None)
        if ticket is None:
            self._ledger.unpin(mm_hash)
            self._admit()
        else:  # the job's pin becomes the core's
            self._held[mm_hash] = (offset, nbytes)
            self._send(FeatureReady(mm_hash, ticket, offset, nbytes))

    def _failed(self, mm_hash: bytes, message: str, code: str) -> None:
        del self._jobs[mm_hash]
        self.num_failures += 1
        self._ledger.discard(mm_hash)
        ticket = self._awaited.pop(mm_hash, None)
        self._admit()
        if ticket is not None:
            self._send(FeatureFailed(mm_hash, ticket, message, code))
