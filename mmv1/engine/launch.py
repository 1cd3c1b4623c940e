"""Start the engine's process, watch it, stop it.

It is started as a plain subprocess, not through multiprocessing: nothing is pickled and the user's __main__ is not run again.
It inherits the pixel slab by file descriptor, and ends by itself when this process does, however that happens. It has a session
of its own, so a Ctrl-C in the terminal reaches only this process, which finishes what it is doing and then ends the other.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

import mmv1
from mmv1.config import EngineConfig

INPUT_SOCKET = "core-in"  # names in the socket directory
OUTPUT_SOCKET = "core-out"
_STOP_TIMEOUT_S = 5.0

# On a CPU the engine shares its cores with the API server and the pool: threads that spin while they wait take from both.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class EngineProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: EngineConfig, socket_dir: Path, slab_fd: int) -> EngineProcess:
        root = str(Path(mmv1.__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mmv1.engine.core_process", str(socket_dir), str(slab_fd)),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(slab_fd,),
            start_new_session=True,
            env={**_ENVIRONMENT, **os.environ, "PYTHONPATH": path},
        )
        message = msgspec.msgpack.encode(config)
        assert process.stdin is not None
        process.stdin.write(len(message).to_bytes(8, "little") + message)
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit status, when it has ended; negative for a signal."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Ask it to end, by the end of its standard input, then make it."""
        if self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
