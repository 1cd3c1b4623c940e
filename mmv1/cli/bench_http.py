"""A light HTTP/1.1 client: one request at a time on a connection, answers handed over piece by piece as they come.

A load of 128 streams is 13,000 events a second and more, each in a packet of its own: what the client spends on one of them, the
server it measures does not get. So there is nothing here between the socket, httptools' parser and who asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools


class Connection(asyncio.Protocol):
    """One connection; `is_open` until either side has closed it."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.WriteTransport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[int] | None = None
        self._take: Callable[[int, bytes], None] = lambda status, piece: None
        self._has_begun = False

    async def ask(self, request: bytes, take: Callable[[int, bytes], None]) -> int:
        """Send a whole request; the answer's status, when all of it has come. Every piece of its body is given to `take` with
        the status, at once. Raises ConnectionError."""
        if self._transport is None or not self.is_open:
            raise ConnectionResetError("the server closed the connection")
        self._take, self._parser, self._has_begun = take, httptools.HttpResponseParser(self), False
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            self._answer = None

    @property
    def was_answered(self) -> bool:
        """Whether anything of the last answer came."""
        return self._has_begun

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio's calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.WriteTransport, transport), True  # uvloop's is no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        if self._parser is None:
            self.close()  # an answer to nothing
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # what `take` raised, wrapped
            self._fail(error.__context__ if isinstance(error.__context__, Exception) else error)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._fail(ConnectionResetError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    # ---- httptools' calls ----

    def on_body(self, body: bytes) -> None:
        assert self._parser is not None
        self._take(self._parser.get_status_code(), body)

    def on_message_complete(self) -> None:
        parser, self._parser = self._parser, None
        assert parser is not None
        if not parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(parser.get_status_code())


class HttpClient:
    """To one server, with as many connections as there are requests at a time. Raises ValueError for a URL that is none."""

    def __init__(self, base_url: str, headers: dict[str, str]) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{base_url!r} is no http:// or https:// URL")
        self._host, self._path = url.hostname, url.path.rstrip("/")
        self._is_tls = url.scheme == "https"
        self._port = url.port or (443 if self._is_tls else 80)
        fields = {"Host": url.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[Connection] = []

    async def ask(self, method: str, path: str, body: bytes, take: Callable[[int, bytes], None]) -> int:
        """The status of the answer, whose pieces go to `take`. Raises OSError, of which ConnectionError is one kind."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._fields}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        while True:
            connection = self._idle.pop() if self._idle else None
            was_idle = connection is not None
            if connection is None:
                connection = await self._connect()
            try:
                status = await connection.ask(request, take)
            except ConnectionResetError:
                if was_idle and not connection.was_answered:  # closed while it was idle: that is no fault of the request
                    continue
                raise
            if connection.is_open:
                self._idle.append(connection)
            return status

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._is_tls or None)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
