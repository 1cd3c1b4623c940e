"""The process of a CLIP model, from outside: one life of it, from its start to its end. Torch-free."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from typing import Any

import msgspec

from mmv1 import child
from mmv1.embedding.messages import (
    ANSWERS_SOCKET,
    JOBS_SOCKET,
    ClipAnswer,
    ClipJob,
    ClipReady,
    ClipSettings,
    Embedded,
    EmbedPicture,
    EmbedText,
    NotEmbedded,
)
from mmv1.embedding.settings import check_clip_model
from mmv1.errors import ConfigError, EmbedderDeadError, ImageError, RequestError
from mmv1.log import logger
from mmv1.preprocess.slab import SlabStore
from mmv1.wire import AsyncReceiver, AsyncSender, ipc_address, new_runtime_dir

_LAST_WORDS_S = 3.0  # from the end of a process that ended by itself until what it said last is here
_MAX_JOBS = 256  # in the process, four batches: the others wait here, where they can be given up


class ClipProcess:
    """`start` before, `close` after; one event loop. `flag`: the setting that names the model. `slab` None: pictures come
    encoded. Niceness above 0: on a CPU, others go first. Raises ConfigError for a name without weights, and without open_clip."""

    def __init__(self, model: str, *, flag: str, slab: SlabStore | None = None, niceness: int = 0) -> None:
        check_clip_model(model, flag)
        self._model, self._flag, self._slab, self._niceness = model, flag, slab, niceness
        self._job_ids = itertools.count()
        self._places = asyncio.Semaphore(_MAX_JOBS)
        self._waiting: dict[int, asyncio.Future[Embedded | NotEmbedded]] = {}  # each has a place
        self._has_ended = False

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        """Start the process; the model is loaded meanwhile."""
        slab = self._slab
        with contextlib.ExitStack() as stack:
            self._runtime_dir = new_runtime_dir()
            stack.callback(shutil.rmtree, self._runtime_dir, ignore_errors=True)
            self._jobs = AsyncSender(ipc_address(self._runtime_dir, JOBS_SOCKET), bind=True)
            stack.callback(self._jobs.close)
            self._answers: AsyncReceiver[ClipAnswer] = AsyncReceiver(
                ipc_address(self._runtime_dir, ANSWERS_SOCKET), ClipAnswer, bind=True
            )
            stack.callback(self._answers.close)
            settings = ClipSettings(
                runtime_dir=str(self._runtime_dir),
                model=self._model,
                slab_fd=None if slab is None else slab.fd,
                slab_bytes=0 if slab is None else slab.nbytes,
                niceness=self._niceness,
            )
            self._process = await child.start(
                *("mmv1.embedding.clip_process", msgspec.json.encode(settings).decode()),
                pass_fds=() if slab is None else (slab.fd,),
                env={"OMP_WAIT_POLICY": "PASSIVE"},
            )
            self._cleanup = stack.pop_all()
        self._ready: asyncio.Future[ClipReady] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self._receive()), asyncio.create_task(self.wait_ended())]

    async def wait_ready(self) -> ClipReady:
        """Returns when the model is loaded. Raises ConfigError when it cannot be."""
        ready = await asyncio.shield(self._ready)
        if ready.error is not None:
            raise ConfigError(f"{self._flag} {self._model} cannot be loaded: {ready.error}")
        return ready

    async def wait_ended(self) -> int:
        """The exit status; negative for a signal. Whoever waited for an answer has heard of it."""
        status = await self._process.wait()
        if status > 0 and not self._ready.done():
            await asyncio.wait({self._ready}, timeout=_LAST_WORDS_S)
        self._end()
        return status

    async def embed_pixels(self, offset: int) -> Embedded:
        """A picture whose pixels lie at `offset` of the slab until this returns. Raises EmbedderDeadError, and then too the slab
        is not read any more."""
        return await self._embed(EmbedPicture(next(self._job_ids), offset))

    async def embed_picture(self, encoded: bytes) -> Embedded:
        """Raises ImageError when it cannot be read, EmbedderDeadError when the process has ended."""
        return await self._embed(EmbedPicture(next(self._job_ids)), encoded)

    async def embed_text(self, text: str, *, truncate: bool) -> Embedded:
        """Raises RequestError, for one that is too long unless `truncate`; EmbedderDeadError."""
        return await self._embed(EmbedText(next(self._job_ids), text, truncate))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await child.stop(self._process)
        self._end()
        self._cleanup.close()

    async def _embed(self, job: ClipJob, encoded: bytes | None = None) -> Embedded:
        await self._places.acquire()
        if self._has_ended:
            self._places.release()
            raise EmbedderDeadError("the embedding model's process has ended")
        answer = self._waiting[job.job_id] = asyncio.get_running_loop().create_future()
        try:
            await self._jobs.send(job, encoded)
        except BaseException:
            self._leave(job.job_id)
            raise
        result = await answer  # one that is not awaited any more keeps its place until the process has answered it
        if isinstance(result, Embedded):
            return result
        if isinstance(job, EmbedPicture):
            raise ImageError(result.message, code=result.code)
        raise RequestError(result.message, code=result.code, param="input")

    def _leave(self, job_id: int) -> asyncio.Future[Embedded | NotEmbedded] | None:
        """Give up a job's place: who waits for it, if it has one."""
        waiting = self._waiting.pop(job_id, None)
        if waiting is not None:
            self._places.release()
        return waiting

    async def _receive(self) -> None:
        try:
            while True:
                answer = await self._answers.recv()
                if isinstance(answer, ClipReady):
                    if not self._ready.done():
                        self._ready.set_result(answer)
                elif (waiting := self._leave(answer.job_id)) is not None and not waiting.done():
                    waiting.set_result(answer)
        except Exception:  # whoever waits hears of the end of a process that cannot be heard any more
            logger.exception("Reading from the embedding model's process failed")
            self._process.kill()

    def _end(self) -> None:
        self._has_ended = True
        if not self._ready.done():
            self._ready.set_result(ClipReady(error="its process ended"))
        for job_id in list(self._waiting):
            waiting = self._leave(job_id)
            if waiting is not None and not waiting.done():
                waiting.set_exception(EmbedderDeadError("the embedding model's process has ended"))
