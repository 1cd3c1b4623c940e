"""Typed one-way streams between processes: msgspec messages over zmq ipc sockets. The only file that imports zmq.

A message is one msgpack frame, optionally followed by one raw payload frame (encoded picture bytes), which is not copied
into the message. Sockets live in a directory only this user can enter. Every socket has a high-water mark: a reader that
stops reading makes the writer wait, it never makes it grow.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

T = TypeVar("T")

_HIGH_WATER_MARK = 16_384  # messages; the payload-carrying streams set their own


def new_runtime_dir() -> Path:
    """A fresh directory for sockets, mode 0700. The caller removes it. (Unix socket paths are limited to 107 bytes, so this
    stays short.)"""
    base = os.environ.get("XDG_RUNTIME_DIR")
    parent = base if base and os.access(base, os.W_OK) and len(base) < 40 else "/tmp"
    return Path(tempfile.mkdtemp(prefix="mmv1-", dir=parent))


def ipc_address(runtime_dir: Path | str, name: str) -> str:
    return f"ipc://{runtime_dir}/{name}"


def _open(socket: Any, address: str, *, bind: bool, high_water_mark: int) -> None:
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.LINGER, 0)
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)


class Sender:
    """The writing end, for a thread. Not shared between threads."""

    def __init__(self, address: str, *, bind: bool = False, high_water_mark: int = _HIGH_WATER_MARK) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        _open(self._socket, address, bind=bind, high_water_mark=high_water_mark)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Any, payload: bytes | None = None) -> None:
        frame = self._encoder.encode(message)
        if payload is None:
            self._socket.send(frame)
        else:
            self._socket.send_multipart([frame, payload], copy=False)

    def close(self, linger_s: float = 0.0) -> None:
        """Close; wait up to `linger_s` seconds for what was sent to leave this process."""
        self._socket.close(linger=int(linger_s * 1000))


class Receiver(Generic[T]):
    """The reading end, for a thread. Not shared between threads. Frames are decoded as `message_type` or refused."""

    def __init__(self, address: str, message_type: Any, *, bind: bool = False, high_water_mark: int = _HIGH_WATER_MARK) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        _open(self._socket, address, bind=bind, high_water_mark=high_water_mark)
        self._decoder = msgspec.msgpack.Decoder(message_type)

    def recv(self, timeout_s: float | None = None) -> T | None:
        """The next message; None after `timeout_s` seconds without one (None waits for ever)."""
        received = self.recv_with_payload(timeout_s)
        return None if received is None else received[0]

    def recv_with_payload(self, timeout_s: float | None = None) -> tuple[T, memoryview | None] | None:
        """The next message and its payload frame, if it has one."""
        if timeout_s is not None and not self._socket.poll(int(timeout_s * 1000), zmq.POLLIN):
            return None
        frames = self._socket.recv_multipart(copy=False)
        message = self._decoder.decode(frames[0].buffer)
        return message, frames[1].buffer if len(frames) > 1 else None

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncSender:
    """The writing end, for an event loop."""

    def __init__(self, address: str, *, bind: bool = False, high_water_mark: int = _HIGH_WATER_MARK) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PUSH)
        _open(self._socket, address, bind=bind, high_water_mark=high_water_mark)
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: Any) -> bytes:
        """A message as `send_frame` takes it. What cannot be encoded raises here, where whoever sends it can be told."""
        return self._encoder.encode(message)

    async def send_frame(self, frame: bytes) -> None:
        await self._socket.send(frame)

    async def send(self, message: Any, payload: bytes | None = None) -> None:
        frame = self._encoder.encode(message)
        if payload is None:
            await self._socket.send(frame)
        else:
            await self._socket.send_multipart([frame, payload], copy=False)

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[T]):
    """The reading end, for an event loop. Frames are decoded as `message_type` or refused."""

    def __init__(self, address: str, message_type: Any, *, bind: bool = False, high_water_mark: int = _HIGH_WATER_MARK) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        _open(self._socket, address, bind=bind, high_water_mark=high_water_mark)
        self._decoder = msgspec.msgpack.Decoder(message_type)

    async def recv(self) -> T:
        frames = await self._socket.recv_multipart(copy=False)
        return self._decoder.decode(frames[0].buffer)

    def close(self) -> None:
        self._socket.close(linger=0)
