"""The API server's end of the engine: its process, its two streams, and the news that it is dead."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from mmv1.config import EngineConfig
from mmv1.engine.launch import INPUT_SOCKET, OUTPUT_SOCKET, EngineProcess
from mmv1.errors import ConfigError, EngineDeadError, EngineError
from mmv1.log import logger
from mmv1.types import (
    EngineCoreInput,
    EngineCoreMessage,
    EngineCoreOutputs,
    EngineDead,
    EngineReady,
    Ping,
    Pong,
    ProfileAnswer,
    StartProfile,
    StopProfile,
)
from mmv1.wire import AsyncReceiver, AsyncSender, ipc_address, new_runtime_dir

_PING_TIMEOUT_S = 2.0
_LAST_WORDS_S = 3.0
_PROFILE_TIMEOUT_S = 600.0  # the trace of minutes is gigabytes
# Requests that stand still for longer are stuck. A long prompt of a large model takes minutes on a CPU.
_MAX_STALL_S = {"cpu": 900.0}
_MAX_STALL_ELSEWHERE_S = 60.0


class EngineClient:
    """`on_outputs` is called with every EngineCoreOutputs, in order; `on_death` once, with a sentence, if the engine ends by
    itself. Both on the event loop that called `start`."""

    def __init__(self, on_outputs: Callable[[EngineCoreOutputs], None], on_death: Callable[[str], None]) -> None:
        self._on_outputs = on_outputs
        self._on_death = on_death
        self._process: EngineProcess | None = None
        self._socket_dir: Path | None = None
        self._sender: AsyncSender | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[EngineReady] | None = None
        self._pings: dict[int, asyncio.Future[Pong]] = {}
        self._last_words = asyncio.Event()  # the engine has said that it ends, and why
        self._profile_calls: dict[int, asyncio.Future[ProfileAnswer]] = {}
        self._call_ids = itertools.count(1)
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._max_stall_s = _MAX_STALL_ELSEWHERE_S
        self.death: str | None = None

    async def start(self, config: EngineConfig, slab_fd: int) -> EngineReady:
        """Launch the engine and wait until its model is loaded. Raises ConfigError, EngineDeadError."""
        self._ready = asyncio.get_running_loop().create_future()
        self._socket_dir = new_runtime_dir()
        self._sender = AsyncSender(ipc_address(self._socket_dir, INPUT_SOCKET), bind=True)
        receiver: AsyncReceiver[EngineCoreMessage] = AsyncReceiver(
            ipc_address(self._socket_dir, OUTPUT_SOCKET), EngineCoreMessage, bind=True
        )
        self._process = await EngineProcess.start(config, self._socket_dir, slab_fd)
        self._tasks = [
            asyncio.create_task(self._receive(receiver)),
            asyncio.create_task(self._send(self._sender)),
            asyncio.create_task(self._watch(self._process)),
        ]
        ready = await self._ready
        if ready.error is not None:
            raise ConfigError(ready.error)
        self._max_stall_s = _MAX_STALL_S.get(ready.device, _MAX_STALL_ELSEWHERE_S)
        return ready

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def send(self, message: EngineCoreInput) -> None:
        """Queue a message for the core; messages arrive in this order."""
        assert self._sender is not None
        self._outbox.put_nowait(self._sender.encode(message))

    async def check_health(self) -> None:
        """Raises EngineDeadError unless the step loop answers now and its requests move on."""
        stalled_s = (await self.ping()).stalled_s
        if stalled_s > self._max_stall_s:
            raise EngineDeadError(f"the engine has not finished a step for {stalled_s:.0f} s")

    async def ping(self) -> Pong:
        """The step loop's answer, which comes with its newest counters. Raises EngineDeadError."""
        if self.death is not None:
            raise EngineDeadError(self.death)
        ping_id = next(self._call_ids)
        answer = self._pings[ping_id] = asyncio.get_running_loop().create_future()
        self.send(Ping(ping_id))
        try:
            return await asyncio.wait_for(answer, _PING_TIMEOUT_S)
        except TimeoutError:
            raise EngineDeadError("the engine's step loop does not answer") from None
        finally:
            del self._pings[ping_id]

    async def profile(self, trace_dir: str | None) -> None:
        """Start to record a trace, or with None stop and write it; returns when that is done. Raises EngineError."""
        if self.death is not None:
            raise EngineDeadError(self.death)
        call_id = next(self._call_ids)
        answer = self._profile_calls[call_id] = asyncio.get_running_loop().create_future()
        self.send(StopProfile(call_id) if trace_dir is None else StartProfile(call_id, trace_dir))
        try:
            error = (await asyncio.wait_for(answer, _PROFILE_TIMEOUT_S)).error
        except TimeoutError:
            raise EngineDeadError("the engine does not answer") from None
        finally:
            del self._profile_calls[call_id]
        if error is not None:
            raise EngineError(error)

    async def close(self) -> None:
        """Stop the engine; whatever it was doing is dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            await self._process.stop()
        if self._sender is not None:
            self._sender.close()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    async def _send(self, sender: AsyncSender) -> None:
        try:
            while True:
                await sender.send_frame(await self._outbox.get())
        except Exception:
            logger.exception("Writing to the engine failed")
            self._die("the engine cannot be written to")

    async def _receive(self, receiver: AsyncReceiver[EngineCoreMessage]) -> None:
        try:
            while True:
                message = await receiver.recv()
                match message:
                    case EngineCoreOutputs():
                        self._take_outputs(message)
                    case EngineReady():
                        self._settle_ready(message)
                    case EngineDead():
                        self._die(message.reason)
        except Exception:
            logger.exception("Reading from the engine failed")
            self._die("the engine's messages cannot be read")
        finally:
            receiver.close()

    def _take_outputs(self, outputs: EngineCoreOutputs) -> None:
        if outputs.pong is not None and (answer := self._pings.get(outputs.pong.ping_id)) is not None and not answer.done():
            answer.set_result(outputs.pong)
        for profiled in outputs.profile_answers:
            if (call := self._profile_calls.get(profiled.call_id)) is not None and not call.done():
                call.set_result(profiled)
        self._on_outputs(outputs)

    def _settle_ready(self, ready: EngineReady) -> None:
        if ready.error is not None:
            self._last_words.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(ready)

    async def _watch(self, process: EngineProcess) -> None:
        status = await process.wait()
        # What it said last may still be on its way, and says more than its status. Ended by itself it has said why.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._last_words.wait(), _LAST_WORDS_S if status > 0 else 0.2)
        self._die(f"the engine's process ended with status {status}")

    def _die(self, reason: str) -> None:
        if self.death is not None:
            return
        self.death = reason
        self._last_words.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDeadError(reason))
            return
        logger.error("The engine is dead: %s", reason)
        self._on_death(reason)
