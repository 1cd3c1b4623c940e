"""Start the engine's process, watch it, stop it. It inherits the pixel slab by file descriptor."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from mmv1 import child
from mmv1.config import EngineConfig

INPUT_SOCKET = "core-in"  # names in the socket directory
OUTPUT_SOCKET = "core-out"

# On a CPU the engine shares its cores with the API server and the pool: threads that spin while they wait take from both.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class EngineProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: EngineConfig, socket_dir: Path, slab_fd: int) -> EngineProcess:
        process = await child.start(
            *("mmv1.engine.core_process", str(socket_dir), str(slab_fd)),
            pass_fds=(slab_fd,),
            env={**_ENVIRONMENT, **os.environ},
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
        await child.stop(self._process)
