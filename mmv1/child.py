"""Start and stop a child process that runs a module of this package.

Children are plain subprocesses, not multiprocessing's: nothing is pickled and the user's __main__ is not run again. They end
with their standard input, that is with this process, however that ends. They have a session of their own, so a Ctrl-C in the
terminal reaches only this process, which finishes what it is doing and then ends them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import mmv1

_STOP_TIMEOUT_S = 5.0


async def start(module: str, *args: str, pass_fds: Sequence[int], env: Mapping[str, str]) -> asyncio.subprocess.Process:
    """`python -m module args`, with this environment and `env` over it. The working directory provides no modules."""
    package_root = str(Path(mmv1.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package_root, *os.environ.get("PYTHONPATH", "").split(os.pathsep))))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *args),
        stdin=asyncio.subprocess.PIPE,
        pass_fds=pass_fds,
        start_new_session=True,
        env={**os.environ, **env, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    )


async def stop(process: asyncio.subprocess.Process) -> None:
    """Ask it to end, by the end of its standard input, then make it."""
    if process.returncode is not None:
        return
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
