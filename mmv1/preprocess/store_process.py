"""The store process: `python -m mmv1.preprocess.store_process`, started by store.py, its settings the first line of its input.

It carries patches between the slab and Redis, so that no megabyte of them passes through the API server, and so that no
process that decodes hostile pictures has a network, a password or the cache secret. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import msgspec

from mmv1.log import configure_logging, logger
from mmv1.preprocess.redis_store import InvalidURLError, RedisStore
from mmv1.preprocess.slab import map_slab
from mmv1.preprocess.store_format import Seal, split
from mmv1.preprocess.store_messages import (
    STORE_ANSWERS_SOCKET,
    URL_REFUSED,
    Load,
    LoadDone,
    Save,
    SaveDone,
    StoreCommand,
    StoreSettings,
    StoreState,
    store_socket,
)
from mmv1.wire import AsyncReceiver, AsyncSender, ipc_address

_STDIN = 0
_MAX_SAVES = 2  # at once: pictures that somebody waits for go before those that are put away


class _Process:
    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._slab = memoryview(map_slab(settings.slab_fd, settings.slab_bytes))
        self._answers = AsyncSender(ipc_address(settings.runtime_dir, STORE_ANSWERS_SOCKET))
        self._store = RedisStore(settings.url, ttl_s=settings.ttl_s, seal=Seal(settings.secret), on_change=self._changed)
        self._saves = asyncio.Semaphore(_MAX_SAVES)
        self._tasks = asyncio.TaskGroup()

    async def serve(self) -> None:
        """Obey, until cancelled. A command that fails ends all the others, and whoever waits for one hears that this process
        has ended."""
        settings = self._settings
        address = ipc_address(settings.runtime_dir, store_socket(settings.generation))
        commands: AsyncReceiver[StoreCommand] = AsyncReceiver(address, StoreCommand, bind=True)
        async with self._tasks:
            await self._store.connect()
            await self._answers.send(StoreState(settings.generation, self._store.is_up))
            while True:
                self._tasks.create_task(self._obey(await commands.recv()))

    async def _obey(self, command: StoreCommand) -> None:
        if isinstance(command, Load):
            await self._load(command)
        elif isinstance(command, Save):
            await self._save(command)
        else:
            await self._store.drop_lease(command.mm_hash)

    async def _load(self, command: Load) -> None:
        """Only what has been checked is written to the slab."""
        outcome, chunks = await self._store.load(command.mm_hash, command.shape)
        position = command.offset
        for chunk in chunks:
            self._slab[position : position + len(chunk)] = chunk
            position += len(chunk)
        await self._answers.send(LoadDone(command.job_id, outcome))

    async def _save(self, command: Save) -> None:
        async with self._saves:
            chunks = split(self._slab[command.offset : command.offset + command.shape.nbytes])
            was_saved = await self._store.save(command.mm_hash, command.shape, chunks)
        await self._answers.send(SaveDone(command.job_id, was_saved))

    def _changed(self, is_up: bool) -> None:
        self._tasks.create_task(self._answers.send(StoreState(self._settings.generation, is_up)))


async def _serve(settings: StoreSettings) -> None:
    loop, serving = asyncio.get_running_loop(), asyncio.create_task(_Process(settings).serve())

    def input_ended() -> None:
        loop.remove_reader(_STDIN)
        serving.cancel()

    loop.add_reader(_STDIN, input_ended)
    await asyncio.wait((serving,))
    if not serving.cancelled():
        serving.result()


def main() -> int:
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=StoreSettings)
    configure_logging("store")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a service's processes at once: the API server decides
    try:
        asyncio.run(_serve(settings))
    except InvalidURLError as error:
        logger.error("%s", error)
        return URL_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
