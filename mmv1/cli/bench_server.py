"""A server of one's own to measure: `mmv1 serve` in a process of its own, on a free port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from mmv1.errors import EngineError

_LISTENING = re.compile(rb"Application startup complete\. Serving .* on (http://\S+)")
_STOP_TIMEOUT_S = 30.0


class RunningServer(NamedTuple):
    url: str
    ready_s: float  # from its start to the line that says it listens


@contextlib.asynccontextmanager
async def running_server(flags: Sequence[str]) -> AsyncIterator[RunningServer]:
    """`mmv1 serve FLAGS`, ended at the end. Raises EngineError with its last words when it ends before it listens."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mmv1", "serve", *flags, "--host", "127.0.0.1", "--port", "0"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the one who measures, who then ends the server
    )
    log = _Log(process)
    try:
        url = await log.listening
        yield RunningServer(url, time.perf_counter() - started)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        await log.ended


class _Log:
    """Reads what the server writes until its end, so that it never waits for a reader."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.ensure_future(self._read(process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        last: deque[str] = deque(maxlen=3)
        async for line in process.stderr:
            last.append(line.decode(errors="replace").strip())
            if (match := _LISTENING.search(line)) and not self.listening.done():
                self.listening.set_result(match[1].decode())
        if not self.listening.done():
            self.listening.set_exception(EngineError(f"the server did not start: {' '.join(last)[-500:]}"))
