"""Children: what they import, and how they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmv1 import child

ROOT = Path(__file__).resolve().parent.parent
POISON = "import os, pathlib\npathlib.Path(__file__).with_suffix('.executed').touch()\nos._exit(42)\n"
MODULES = ["blake3", "msgspec", "zmq", "torch", "json", "mmv1"]

_POOL = """
import asyncio
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.slab import SlabStore

async def main():
    slab = SlabStore(1 << 20)
    pool = PreprocessPool(slab_fd=slab.fd, slab_bytes=slab.nbytes, num_workers=1, on_failure=print)
    await pool.start()
    await pool.wait_ready()
    await pool.close()

asyncio.run(main())
"""
_ENGINE = """
import asyncio, sys
from mmv1.config import EngineArgs, resolve
from mmv1.engine.client import EngineClient
from mmv1.preprocess.slab import SlabStore

async def main():
    client = EngineClient(print, print)
    print(await client.start(resolve(EngineArgs(model=sys.argv[1], load_format="dummy")), SlabStore(1 << 20).fd))
    await client.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("script", [_POOL, _ENGINE], ids=["pool", "engine"])
def test_the_working_directory_provides_no_modules(script: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    """A user may start the server in a directory full of somebody's files."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(POISON)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", script, str(tiny_model_dir)]  # -P is for the parent alone
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert not list(tmp_path.glob("*.executed"))
    assert result.returncode == 0, result.stderr


_STUBBORN = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def test_one_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_STOP_TIMEOUT_S", 0.1)

    async def run() -> int | None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _STUBBORN, stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        await process.stdout.readline()
        await child.stop(process)
        await child.stop(process)
        return process.returncode

    assert asyncio.run(run()) == -9
