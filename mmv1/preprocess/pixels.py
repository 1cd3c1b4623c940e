"""Pixels by hash: answers the core's PixelRequests from the slab, else from the pool, each picture's work done once.

The order slab -> pool stands in two neighbouring methods, `request` and `_produce`; a further store of processed pictures goes
at the head of `_produce`. One event loop, one owner: the ledger, the tickets and the jobs all live here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from mmv1.errors import EngineError, ImageError
from mmv1.log import logger
from mmv1.preprocess.layout import ImagePlace
from mmv1.preprocess.media import EncodedImage
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.pool_messages import DecodeJob
from mmv1.preprocess.slab import SlabLedger
from mmv1.types import FeatureFailed, FeatureReady, PixelRequest, SlabShort

SendFeature = Callable[[FeatureReady | FeatureFailed | SlabShort], None]

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
    num_references: int = 0


@dataclass(eq=False, slots=True)
class _Job:
    """One picture on its way into the slab: waiting for a slot (no task yet), then for a worker, then with one."""

    job_id: int
    picture: _Picture
    task: asyncio.Task[None] | None = None


class PixelService:
    """What the core holds or awaits, and the work that follows from it.

    For the core a picture is in one of three states: nothing; awaited, with the ticket of the newest request; held, its slot
    pinned once for the core however often it was asked for. `release` ends both. A job pins its slot too, so that a worker
    never writes where something else lies, whatever the core has decided meanwhile.
    """

    def __init__(self, *, rules: PatchRules, ledger: SlabLedger, pool: PreprocessPool, send: SendFeature) -> None:
        self._rules = rules
        self._ledger = ledger
        self._pool = pool
        self._send = send
        self._pictures: dict[bytes, _Picture] = {}
        self._awaited: dict[bytes, int] = {}  # mm_hash -> ticket
        self._held: dict[bytes, tuple[int, int]] = {}  # mm_hash -> (offset, nbytes)
        self._jobs: dict[bytes, _Job] = {}
        self._next_job_id = 0
        self._pressing: asyncio.Task[None] | None = None
        self.num_slab_hits = 0
        self.num_decodes = 0
        self.num_failures = 0
        self.decode_seconds = 0.0

    @property
    def encoded_bytes(self) -> int:
        """Encoded bytes kept for live requests."""
        return sum(len(picture.image.data) for picture in self._pictures.values())

    @property
    def num_jobs(self) -> int:
        """Pictures on their way into the slab."""
        return len(self._jobs)

    def add_reference(self, mm_hash: bytes, image: EncodedImage, place: ImagePlace) -> None:
        """Keep a picture's encoded bytes as long as somebody refers to it: its pixels may be asked for at any time."""
        self._pictures.setdefault(mm_hash, _Picture(image, place)).num_references += 1

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

    def release(self, mm_hash: bytes) -> None:
        """The core no longer holds or awaits this picture. A job no worker has yet is withdrawn; one that a worker has runs
        on, and what it makes stays in the slab for the next request. Unknown hashes are ignored."""
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
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        tasks += [self._pressing] if self._pressing is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_job(self, mm_hash: bytes, picture: _Picture) -> None:
        job = self._jobs[mm_hash] = _Job(self._next_job_id, picture)
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
        place = job.picture.place
        decode = DecodeJob(
            job_id=job.job_id,
            header=job.picture.image.header,
            resized_height=place.resized_height,
            resized_width=place.resized_width,
            patch_size=self._rules.patch_size,
            merge_size=self._rules.merge_size,
            resample=self._rules.resample,
            offset=offset,
            nbytes=place.nbytes,
        )
        try:
            seconds = await self._pool.submit(decode, job.picture.image.data)
        except ImageError as error:
            self._failed(mm_hash, error.message, error.code)
        except Exception as error:
            if not isinstance(error, EngineError):  # the pool has ended, and has said so
                logger.exception("Having a picture processed failed")
            self._failed(mm_hash, "the image could not be processed: the server is failing", "internal_error")
        else:
            self.num_decodes += 1
            self.decode_seconds += seconds  # added only here: the sum may have changed while this job was waited for
            self._ready(mm_hash, offset, place.nbytes)

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
