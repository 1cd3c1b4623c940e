"""The preprocess pool's processes: `python -m mmv1.preprocess.pool_process SETTINGS`, started by pool.py.

The parent imports torch and Pillow once, forks the workers and forks again whatever dies; it never touches a picture and opens
no socket (a zmq context does not survive a fork). It ends when its standard input does, that is with the API server, however
that ended; the workers end with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import shutil
import signal
import sys
from pathlib import Path

import msgspec

from mmv1.errors import ImageError
from mmv1.log import configure_logging, logger
from mmv1.preprocess.decode import decode_into, prepare_process
from mmv1.preprocess.pool_messages import (
    ANSWERS_SOCKET,
    DecodeJob,
    JobDone,
    JobFailed,
    PoolAnswer,
    PoolSettings,
    WorkerReady,
    worker_socket,
)
from mmv1.preprocess.slab import map_slab
from mmv1.wire import Receiver, Sender, ipc_address

_STDIN, _STDERR = 0, 2
_LARGE_PIXELS = 16 << 20  # of a picture whose memory is given back at once
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MAX_OPEN_FILES = 64
_START_FAILED = 3  # exit status of a worker that never came to serve: another fork would fare no better


def main() -> int:
    settings = msgspec.json.decode(sys.argv[1], type=PoolSettings)
    configure_logging("preprocess")
    prepare_process()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a service's processes at once: the API server decides
    try:
        return _supervise(settings)
    finally:
        shutil.rmtree(settings.runtime_dir, ignore_errors=True)


def _supervise(settings: PoolSettings) -> int:
    """Keep `num_workers` workers alive until standard input ends."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    workers = {_fork(settings, index, 0): (index, 0) for index in range(settings.num_workers)}
    try:
        while True:
            readable, _, _ = select.select([_STDIN, wake_read], [], [])
            if _STDIN in readable and not os.read(_STDIN, 4096):
                return 0
            if wake_read in readable:
                os.read(wake_read, 4096)
            # All of them leave the list first: a pid that has been reaped may belong to somebody else by now.
            ended = [(workers.pop(pid), status) for pid, status in _reap()]
            for (index, generation), status in ended:
                code = os.waitstatus_to_exitcode(status)
                if code == _START_FAILED:
                    return _START_FAILED
                logger.warning("preprocess worker %d died (status %d); starting another", index, code)
                workers[_fork(settings, index, generation + 1)] = (index, generation + 1)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


def _reap() -> list[tuple[int, int]]:
    """(pid, status) of every child that has ended."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended.append((pid, status))


def _fork(settings: PoolSettings, index: int, generation: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = _START_FAILED
    try:
        _restrict(parent)
        worker = _Worker(settings, index, generation)
        _limit_resources(settings.worker_memory_bytes)
        status = 1
        worker.serve()
    except BaseException:
        logger.exception("preprocess worker %d failed", index)
    finally:
        os._exit(status)


def _restrict(parent: int) -> None:
    """Die with the parent, gain no privileges, reach no network, and leave the parent's signals, input and log alone."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.stderr = os.fdopen(os.dup(_STDERR), "w", buffering=1)
    configure_logging("preprocess")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, _STDIN)
    os.dup2(null, _STDERR)  # where C libraries complain of pictures, whose senders could fill the log with it
    os.close(null)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.unshare(_CLONE_NEWNET):  # an ordinary user may have an empty network of his own in a user namespace, if at all
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        raise ChildProcessError("the parent is gone")


def _limit_resources(memory_bytes: int) -> None:
    """What a decoder gone astray may take, from here on: memory, files, and no core dump, which would hold users' pictures."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))


class _Worker:
    """One picture at a time, from its socket into the slab."""

    def __init__(self, settings: PoolSettings, index: int, generation: int) -> None:
        self._index, self._generation = index, generation
        self._cpu_seconds = settings.job_cpu_seconds
        self._slab = memoryview(map_slab(settings.slab_fd, settings.slab_bytes))
        address = ipc_address(settings.runtime_dir, worker_socket(index, generation))
        self._jobs: Receiver[DecodeJob] = Receiver(address, DecodeJob, bind=True)
        self._answers = Sender(ipc_address(settings.runtime_dir, ANSWERS_SOCKET))

    def serve(self) -> None:
        self._answers.send(WorkerReady(self._index, self._generation))
        while True:
            received = self._jobs.recv_with_payload()
            if received is None:
                continue
            job, payload = received
            signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds)  # SIGPROF kills, also inside a decoder's C code
            answer = self._run(job, payload)
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._answers.send(answer)
            is_large = job.header.width * job.header.height > _LARGE_PIXELS
            del received, job, payload
            if is_large:
                ctypes.CDLL(None).malloc_trim(0)  # also what lies between blocks that are still in use

    def _run(self, job: DecodeJob, payload: memoryview | None) -> PoolAnswer:
        out = self._slab[job.offset : job.offset + job.nbytes]
        try:
            decode_s, resize_s = decode_into(payload if payload is not None else b"", job, out)
        except ImageError as error:
            return JobFailed(self._index, self._generation, job.job_id, error.message, error.code)
        return JobDone(self._index, self._generation, job.job_id, decode_s, resize_s)


if __name__ == "__main__":
    sys.exit(main())
