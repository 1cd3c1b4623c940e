"""The API server's end of an engine whose process is not one: what it hears of its end."""

from __future__ import annotations

import asyncio
import sys

import pytest

from mmv1 import child
from mmv1.config import EngineArgs, resolve
from mmv1.engine.client import EngineClient
from mmv1.engine.launch import OUTPUT_SOCKET
from mmv1.errors import ConfigError
from mmv1.types import EngineReady
from mmv1.wire import AsyncSender, ipc_address


def test_what_the_engine_said_before_it_ended_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine its last message is read after its end is known."""

    async def start(module: str, socket_dir: str, *args: str, **options: object) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "exit(1)", stdin=asyncio.subprocess.PIPE)
        sender = AsyncSender(ipc_address(socket_dir, OUTPUT_SOCKET))
        senders.append(sender)
        words.append(asyncio.create_task(say_later(process, sender)))
        return process

    async def say_later(process: asyncio.subprocess.Process, sender: AsyncSender) -> None:
        assert await process.wait() == 1
        await asyncio.sleep(0.5)
        await sender.send(EngineReady(error="no memory is left"))

    async def run() -> None:
        client = EngineClient(print, print)
        try:
            with pytest.raises(ConfigError, match="no memory is left"):
                await client.start(resolve(EngineArgs()), 0)
        finally:
            await client.close()
            await asyncio.gather(*words)
            senders[0].close()

    senders: list[AsyncSender] = []
    words: list[asyncio.Task[None]] = []
    monkeypatch.setattr(child, "start", start)
    asyncio.run(run())
