"""The preprocess pool, seen from the API server: which worker is idle, who goes next, and what to do when one dies.

The processes themselves are pool_process.py. Knows jobs and workers; nothing of hashes, slots or requests.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mmv1 import child
from mmv1.errors import EngineError, ImageError
from mmv1.log import logger
from mmv1.preprocess.pool_messages import (
    ANSWERS_SOCKET,
    DecodeJob,
    JobDone,
    JobFailed,
    JobTimes,
    PoolAnswer,
    PoolSettings,
    WorkerReady,
    worker_socket,
)
from mmv1.wire import AsyncReceiver, AsyncSender, ipc_address, new_runtime_dir

_MAX_ATTEMPTS = 2  # a job whose worker died is tried once more
_QUICK_PIXELS = 4_000_000  # decoded and resized within about 50 ms
_JOB_CPU_SECONDS = 30.0  # then the worker is killed; the slowest honest picture within the limits takes about two
_WORKER_MEMORY_BYTES = 1 << 30  # what a worker may map on top of what it starts with

# Blocks of ordinary pictures come from the heap and stay there: otherwise every picture maps, faults and unmaps its buffers
# anew. What a large picture needs beyond that goes back to the system. One thread: the workers are the parallelism, and a fork
# must not lose a thread pool.
_POOL_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(eq=False, slots=True)
class _PoolJob:
    job: DecodeJob
    payload: bytes
    result: asyncio.Future[JobTimes]
    submitted_s: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    attempts: int = 0

    @property
    def is_quick(self) -> bool:
        return self.job.header.width * self.job.header.height <= _QUICK_PIXELS

    def begin(self) -> None:
        """Its worker is about to work at it."""
        self.attempts += 1
        self.queue_s = time.perf_counter() - self.submitted_s


@dataclass(eq=False, slots=True)
class _Worker:
    index: int
    generation: int
    sender: AsyncSender
    jobs: deque[_PoolJob] = field(default_factory=deque)  # the first is under way; a second is there already, and waits


class PreprocessPool:
    """Runs DecodeJobs in order of arrival, one at a time per worker. While all are busy, each has its next job already, so that
    it never waits for the wire; not behind a large picture, which another worker may outrun.

    `submit` gives a future: JobTimes, or ImageError (the picture's fault, or its worker died twice), or EngineError
    (the pool has ended). `on_failure` is called once, with a sentence, when the pool has ended by itself and for good.
    """

    def __init__(self, *, slab_fd: int, slab_bytes: int, num_workers: int, on_failure: Callable[[str], None]) -> None:
        self._slab_fd = slab_fd
        self._slab_bytes = slab_bytes
        self._num_workers = num_workers
        self._on_failure = on_failure
        self._runtime_dir: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._answers: AsyncReceiver[PoolAnswer] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: dict[int, _Worker] = {}
        self._idle: list[_Worker] = []  # the last to finish, or to come up, works next: its caches are warm, and it lives
        self._pending: deque[_PoolJob] = deque()
        self._sending: set[asyncio.Task[None]] = set()
        self._all_ready = asyncio.Event()
        self._dead: str | None = None
        self.num_deaths = 0

    async def start(self) -> None:
        """Start the processes; they come up in the background, and jobs wait for them. Without workers there is none to start."""
        if not self._num_workers:
            self._all_ready.set()
            return
        self._runtime_dir = new_runtime_dir()
        self._answers = AsyncReceiver(ipc_address(self._runtime_dir, ANSWERS_SOCKET), PoolAnswer, bind=True)
        settings = PoolSettings(
            runtime_dir=str(self._runtime_dir),
            slab_fd=self._slab_fd,
            slab_bytes=self._slab_bytes,
            num_workers=self._num_workers,
            job_cpu_seconds=_JOB_CPU_SECONDS,
            worker_memory_bytes=_WORKER_MEMORY_BYTES,
        )
        self._process = await child.start(
            *("mmv1.preprocess.pool_process", msgspec.json.encode(settings).decode()),
            pass_fds=(self._slab_fd,),
            env=_POOL_ENVIRONMENT,
        )
        self._tasks = [asyncio.create_task(self._receive(self._answers)), asyncio.create_task(self._watch(self._process))]

    async def wait_ready(self) -> None:
        """Wait until every worker has come up. Raises EngineError if the pool ends before."""
        await self._all_ready.wait()
        if self._dead is not None:
            raise EngineError(self._dead)

    async def close(self) -> None:
        """End the processes. Jobs not done fail with EngineError."""
        self._end("the server is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            await child.stop(self._process)
        if self._answers is not None:
            self._answers.close()
        if self._runtime_dir is not None:
            shutil.rmtree(self._runtime_dir, ignore_errors=True)

    @property
    def pid(self) -> int | None:
        """The parent process, which the workers are children of."""
        return None if self._process is None else self._process.pid

    def submit(self, job: DecodeJob, payload: bytes) -> asyncio.Future[JobTimes]:
        pool_job = _PoolJob(job, payload, asyncio.get_running_loop().create_future())
        if self._dead is not None:
            pool_job.result.set_exception(EngineError(self._dead))
        else:
            self._pending.append(pool_job)
            self._dispatch()
        return pool_job.result

    def withdraw(self, job_id: int) -> bool:
        """Forget a job no worker has yet: whether that was possible. Its future is cancelled then."""
        for pool_job in self._pending:
            if pool_job.job.job_id == job_id and not pool_job.attempts:
                self._pending.remove(pool_job)
                pool_job.result.cancel()
                return True
        return False

    def _dispatch(self) -> None:
        while self._pending and (worker := self._next_worker()) is not None:
            pool_job = self._pending.popleft()
            worker.jobs.append(pool_job)
            if len(worker.jobs) == 1:
                pool_job.begin()
            sending = asyncio.create_task(self._send(worker, pool_job))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    def _next_worker(self) -> _Worker | None:
        """An idle one, else one whose only job will soon be done."""
        if self._idle:
            return self._idle.pop()
        return next((worker for worker in self._workers.values() if len(worker.jobs) == 1 and worker.jobs[0].is_quick), None)

    async def _send(self, worker: _Worker, pool_job: _PoolJob) -> None:
        if pool_job not in worker.jobs:  # the worker died before this task ran, and `_bury` has seen to the job
            return
        try:
            await worker.sender.send(pool_job.job, pool_job.payload)
        except Exception:
            if pool_job in worker.jobs:
                logger.exception("Sending to a preprocess worker failed")
                self._fail("jobs cannot be sent to the preprocess pool any more")

    async def _receive(self, answers: AsyncReceiver[PoolAnswer]) -> None:
        try:
            while True:
                try:
                    answer = await answers.recv()
                except msgspec.MsgspecError:
                    logger.warning("dropped a malformed message of a preprocess worker")
                    continue
                if isinstance(answer, WorkerReady):
                    self._on_worker_ready(answer)
                else:
                    self._on_result(answer)
                self._dispatch()
        except Exception:
            logger.exception("Reading from the preprocess pool failed")
            self._fail("the preprocess pool's answers cannot be read any more")

    def _on_worker_ready(self, ready: WorkerReady) -> None:
        """A new worker. One that takes the place of another says by this that the other is dead, and its job with it."""
        before = self._workers.get(ready.worker)
        if before is not None:
            if ready.generation <= before.generation:
                return
            self._bury(before)
        address = ipc_address(str(self._runtime_dir), worker_socket(ready.worker, ready.generation))
        worker = _Worker(ready.worker, ready.generation, AsyncSender(address))
        self._workers[ready.worker] = worker
        self._idle.append(worker)
        if len(self._workers) == self._num_workers:
            self._all_ready.set()

    def _bury(self, worker: _Worker) -> None:
        self.num_deaths += 1
        worker.sender.close()
        if worker in self._idle:
            self._idle.remove(worker)
        if not worker.jobs:
            return
        under_way, *waiting = worker.jobs
        worker.jobs.clear()
        self._pending.extendleft(waiting)
        if under_way.result.done():
            return
        if under_way.attempts < _MAX_ATTEMPTS:
            self._pending.appendleft(under_way)
        else:
            under_way.result.set_exception(ImageError("the image cannot be decoded: the decoder ended twice while reading it"))

    def _on_result(self, answer: JobDone | JobFailed) -> None:
        worker = self._workers.get(answer.worker)
        if worker is None or worker.generation != answer.generation or not worker.jobs:
            return
        if worker.jobs[0].job.job_id != answer.job_id:
            return
        pool_job = worker.jobs.popleft()
        if worker.jobs:
            worker.jobs[0].begin()
        else:
            self._idle.append(worker)
        if pool_job.result.done():
            return
        if isinstance(answer, JobFailed):
            pool_job.result.set_exception(ImageError(answer.message, code=answer.code))
        else:
            pool_job.result.set_result(JobTimes(pool_job.queue_s, answer.decode_s, answer.resize_s))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        self._fail(f"the preprocess pool ended by itself (status {status}); its last lines in the log say why")

    def _fail(self, reason: str) -> None:
        """End for good, and say so once."""
        if self._dead is not None:
            return
        self._end(reason)
        logger.error("%s", reason)
        self._on_failure(reason)

    def _end(self, reason: str) -> None:
        """Fail every job. Whatever comes later fails at once."""
        if self._dead is not None:
            return
        self._dead = reason
        self._all_ready.set()
        running = [pool_job for worker in self._workers.values() for pool_job in worker.jobs]
        for worker in self._workers.values():
            worker.jobs.clear()
            worker.sender.close()
        for pool_job in (*self._pending, *running):
            if not pool_job.result.done():
                pool_job.result.set_exception(EngineError(reason))
        self._pending.clear()
        self._idle.clear()
