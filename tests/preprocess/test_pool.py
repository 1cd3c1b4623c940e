"""The pool with real processes: work, order, deaths, ends."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
from PIL import Image

import mmv1.preprocess.pool as pool_module
import mmv1.preprocess.pool_process as pool_process
from mmv1.errors import EngineError, ImageError
from mmv1.preprocess.header import probe_header
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.pool_messages import PoolSettings
from mmv1.preprocess.slab import SlabStore, map_slab
from tests.pictures import make_image, make_pil
from tests.preprocess.processes import children, cpu_seconds, is_alive, wait_until
from tests.preprocess.test_decode import EXTRA_FORMATS, decode_job, our_patches

SLAB_BYTES = 16 << 20
TIMEOUT_S = 60


def make_job(job_id, encoded, offset=0):
    return decode_job(probe_header(encoded, EXTRA_FORMATS), offset, job_id)


class Harness:
    """A pool of two workers, its slab, and a loop to run it in."""

    def __init__(self, num_workers=2, slab_bytes=SLAB_BYTES):
        self.runner = asyncio.Runner()
        self.slab = SlabStore(SLAB_BYTES)
        self.failures = []
        self.pool = PreprocessPool(
            slab_fd=self.slab.fd, slab_bytes=slab_bytes, num_workers=num_workers, on_failure=self.failures.append
        )
        self.runner.run(self.pool.start())

    def run(self, awaitable):
        async def bounded():
            async with asyncio.timeout(TIMEOUT_S):
                return await awaitable

        return self.runner.run(bounded())

    def wait_for(self, condition):
        """Until it holds, with the event loop running."""

        async def poll():
            while not condition():
                await asyncio.sleep(0.005)

        self.run(poll())

    def submit(self, job, payload):
        async def submit():
            return self.pool.submit(job, payload)

        return self.run(submit())

    def workers(self):
        return children(self.pool.pid)

    def read(self, offset, nbytes):
        with map_slab(self.slab.fd, SLAB_BYTES) as slab:
            return slab[offset : offset + nbytes]

    def close(self):
        self.run(self.pool.close())
        self.slab.close()
        self.runner.close()


@pytest.fixture(scope="module")
def harness():
    harness = Harness()
    harness.run(harness.pool.wait_ready())
    yield harness
    processes = [harness.pool.pid, *harness.workers()]
    harness.close()
    wait_until(lambda: not any(is_alive(pid) for pid in processes))
    assert len(processes) == 3 and not harness.failures


def patches(encoded):
    return our_patches(encoded).numpy().tobytes()


def test_many_pictures_land_in_their_places(harness):
    pictures = [make_image(100 + 10 * n, 90, n, ("JPEG", "PNG", "WEBP", "GIF")[n % 4]) for n in range(24)]
    jobs = [make_job(n, encoded, offset=n << 19) for n, encoded in enumerate(pictures)]
    futures = [harness.submit(job, encoded) for job, encoded in zip(jobs, pictures, strict=True)]
    started = time.monotonic()
    times = harness.run(asyncio.wait_for(_gather(futures), TIMEOUT_S))
    elapsed = time.monotonic() - started
    assert all(min(t) >= 0 and 0 < t.decode_s < elapsed and 0 < t.resize_s < elapsed for t in times)
    for job, encoded in zip(jobs, pictures, strict=True):
        assert harness.read(job.offset, job.nbytes) == patches(encoded)


async def _gather(futures):
    return await asyncio.gather(*futures)


def test_damaged_pictures_fail_and_the_next_is_served(harness):
    good = make_image(200, 150)
    workers = harness.workers()
    for bad in (good[: len(good) // 2], make_image(200, 150, format="PNG")[:300], make_image(200, 150, format="WEBP")[:-50]):
        with pytest.raises(ImageError) as error:
            harness.run(harness.submit(make_job(1, bad), bad))
        assert error.value.code == "invalid_image" and "0x" not in error.value.message
    with pytest.raises(ImageError):
        harness.run(harness.submit(make_job(1, good), make_image(201, 150)))  # another size than the header's
    assert harness.run(harness.submit(make_job(1, good), good)).decode_s > 0
    assert harness.workers() == workers


def test_a_job_whose_worker_died_is_done_by_another(harness):
    """Both workers are stopped with a job each, then killed: the jobs are tried again and succeed."""
    workers, deaths = harness.workers(), harness.pool.num_deaths
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    pictures = [make_image(120, 90, seed) for seed in (1, 2, 3)]
    futures = [harness.submit(make_job(10 + n, encoded, offset=n << 19), encoded) for n, encoded in enumerate(pictures)]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    harness.run(_gather(futures))
    assert harness.pool.num_deaths == deaths + 2 and not harness.failures
    wait_until(lambda: len(harness.workers()) == 2)
    assert not set(workers) & set(harness.workers())
    for n, encoded in enumerate(pictures):
        assert harness.read(n << 19, len(patches(encoded))) == patches(encoded)


def test_pending_jobs_can_be_withdrawn_and_those_handed_over_cannot(harness):
    workers = harness.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    encoded = make_image(120, 90)
    futures = [harness.submit(make_job(n, encoded, (n - 20) << 19), encoded) for n in range(20, 26)]
    withdrawn = [harness.pool.withdraw(n) for n in (20, 21, 22, 23, 24, 99)]
    assert withdrawn == [False, False, False, False, True, False]  # two under way, two that wait at their workers
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    harness.run(_gather([*futures[:4], futures[5]]))
    assert futures[4].cancelled()


def test_jobs_start_in_order_and_a_worker_has_one_that_waits_at_most(harness, monkeypatch):
    sent, send = [], PreprocessPool._send

    async def recording(pool, worker, pool_job):
        sent.append(pool_job.job.job_id)
        assert len(sent) <= 4 + sum(future.done() for future in futures)
        await send(pool, worker, pool_job)

    monkeypatch.setattr(PreprocessPool, "_send", recording)
    encoded, futures = make_image(120, 90), []
    for n in range(30, 50):
        futures.append(harness.submit(make_job(n, encoded), encoded))
    harness.run(_gather(futures))
    assert sent == list(range(30, 50))


def test_no_job_waits_behind_a_large_picture(harness):
    slow, quick = slow_picture(), make_image(120, 90)
    futures = [harness.submit(make_job(0, slow), slow)]
    futures += [harness.submit(make_job(n, quick, n << 19), quick) for n in range(1, 8)]
    harness.run(_gather(futures[1:]))
    assert not futures[0].done()
    harness.run(_gather(futures))


def test_a_job_that_only_waited_at_a_dead_worker_was_not_tried(harness):
    """Killed with three jobs before it, each time the one under way is what is counted."""
    workers = harness.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    encoded = make_image(120, 90)
    futures = [harness.submit(make_job(n, encoded, n << 19), encoded) for n in range(5)]
    jobs = [job for worker in harness.pool._workers.values() for job in worker.jobs] + list(harness.pool._pending)
    deaths = harness.pool.num_deaths
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    harness.run(_gather(futures))
    assert harness.pool.num_deaths == deaths + 2
    assert sorted((job.job.job_id, job.attempts) for job in jobs) == [(0, 2), (1, 2), (2, 1), (3, 1), (4, 1)]


@cache
def slow_picture():
    """Takes about a second to decode."""
    buffer = io.BytesIO()
    make_pil(500, 500).convert("RGBA").resize((5500, 5500), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_a_worker_killed_while_it_decodes(harness):
    """Its picture is done by another, the pool is whole again within a second, and other pictures are not touched."""
    workers, deaths = harness.workers(), harness.pool.num_deaths
    idle = {pid: cpu_seconds(pid) for pid in workers}
    slow = slow_picture()
    future = harness.submit(make_job(60, slow), slow)
    [pool_job] = [job for worker in harness.pool._workers.values() for job in worker.jobs]
    wait_until(lambda: any(cpu_seconds(pid) >= idle[pid] + 0.1 for pid in workers))
    busy = max(workers, key=lambda pid: cpu_seconds(pid) - idle[pid])
    os.kill(busy, signal.SIGSTOP)
    pictures = [make_image(120, 90, seed) for seed in (1, 2, 3)]
    futures = [harness.submit(make_job(61 + n, encoded, (1 + n) << 19), encoded) for n, encoded in enumerate(pictures)]
    killed_s = time.monotonic()
    os.kill(busy, signal.SIGKILL)
    harness.wait_for(lambda: harness.pool.num_deaths == deaths + 1)
    assert time.monotonic() - killed_s < 1.0
    assert len(harness.workers()) == 2 and busy not in harness.workers() and not harness.failures
    times = harness.run(_gather([future, *futures]))
    assert pool_job.attempts == 2 and times[0].decode_s > times[0].resize_s
    for n, encoded in enumerate([slow, *pictures]):
        assert harness.read(n << 19, len(patches(encoded))) == patches(encoded)


@pytest.mark.skipif(sys.platform != "linux", reason="CPU timers as Linux has them")
def test_a_picture_that_kills_its_workers_fails_and_nothing_else_does(monkeypatch):
    monkeypatch.setattr(pool_module, "_JOB_CPU_SECONDS", 0.2)
    harness = Harness(num_workers=2)
    try:
        harness.run(harness.pool.wait_ready())
        slow, good = slow_picture(), make_image(120, 90)
        futures = [harness.submit(make_job(n, good, n << 19), good) for n in range(6)]
        poison = harness.submit(make_job(6, slow, 6 << 19), slow)
        futures += [harness.submit(make_job(n, good, n << 19), good) for n in range(7, 20)]
        harness.run(_gather(futures))
        with pytest.raises(ImageError, match="twice") as error:
            harness.run(poison)
        assert (error.value.status, error.value.code) == (400, "invalid_image")
        harness.wait_for(lambda: len(harness.pool._idle) == 2)
        assert harness.pool.num_deaths == 2 and len(harness.workers()) == 2 and not harness.failures
        for n in (*range(6), *range(7, 20)):
            assert harness.read(n << 19, len(patches(good))) == patches(good)
    finally:
        harness.close()


def test_the_end_of_the_parent_is_reported_and_nothing_survives():
    harness = Harness()
    harness.run(harness.pool.wait_ready())
    workers = harness.workers()
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    encoded = make_image(60, 60)
    running = harness.submit(make_job(1, encoded), encoded)
    os.kill(harness.pool.pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        harness.run(running)
    assert len(harness.failures) == 1 and "preprocess pool" in harness.failures[0]
    with pytest.raises(EngineError):
        harness.run(harness.submit(make_job(2, encoded), encoded))
    wait_until(lambda: not any(is_alive(pid) for pid in workers))
    runtime_dir = harness.pool._runtime_dir
    harness.close()
    assert not runtime_dir.exists()


def test_a_pool_that_cannot_start_says_so():
    harness = Harness(slab_bytes=2 * SLAB_BYTES)  # more than the file has
    with pytest.raises(EngineError, match="status 3"):
        harness.run(harness.pool.wait_ready())
    assert len(harness.failures) == 1
    harness.close()


@pytest.mark.parametrize("where", ["sending", "receiving"])
def test_a_broken_stream_ends_the_pool_and_nobody_waits(where, monkeypatch):
    harness = Harness(num_workers=1)
    try:
        harness.run(harness.pool.wait_ready())
        if where == "sending":
            [worker] = harness.pool._workers.values()
            monkeypatch.setattr(worker.sender, "send", None)
        else:
            monkeypatch.setattr(harness.pool, "_on_result", None)
        encoded = make_image(60, 60)
        with pytest.raises(EngineError, match="preprocess pool"):
            harness.run(harness.submit(make_job(1, encoded), encoded))
        assert len(harness.failures) == 1 and "any more" in harness.failures[0]
    finally:
        harness.close()
    assert len(harness.failures) == 1  # the end of its processes is no further news


_SERVER = """
import asyncio, sys
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.slab import SlabStore

async def main():
    slab = SlabStore(1 << 20)
    pool = PreprocessPool(slab_fd=slab.fd, slab_bytes=slab.nbytes, num_workers=2, on_failure=print)
    await pool.start()
    await pool.wait_ready()
    print(pool.pid, pool._runtime_dir, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_nothing_survives_a_killed_server():
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    try:
        pid, runtime_dir = server.stdout.readline().split()
        workers = children(int(pid))
        assert len(workers) == 2 and is_alive(int(pid))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    wait_until(lambda: not any(is_alive(p) for p in [int(pid), *workers]))
    wait_until(lambda: not os.path.exists(runtime_dir))


def test_workers_that_end_together_are_not_killed_once_more(monkeypatch):
    limits = {"job_cpu_seconds": 1.0, "worker_memory_bytes": 0}
    settings = PoolSettings(runtime_dir="nowhere", slab_fd=-1, slab_bytes=0, num_workers=2, **limits)
    pids = iter((101, 102))
    monkeypatch.setattr(pool_process, "_fork", lambda *args: next(pids))
    monkeypatch.setattr(pool_process, "_reap", lambda: [(101, 3 << 8), (102, 3 << 8)])
    monkeypatch.setattr(pool_process.select, "select", lambda *args: ([], [], []))
    monkeypatch.setattr(pool_process.signal, "set_wakeup_fd", lambda *args, **options: -1)
    monkeypatch.setattr(pool_process.signal, "signal", lambda *args: None)
    killed = []
    monkeypatch.setattr(pool_process.os, "kill", lambda pid, number: killed.append(pid))
    assert pool_process._supervise(settings) == 3
    assert not killed
