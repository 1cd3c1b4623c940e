"""The light HTTP client: what servers do to a connection, on the event loop that the command uses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from mmv1.cli.bench_http import HttpClient

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n3\r\nne!\r\n0\r\n\r\n"


class Server:
    """Gives the scripted answers, one a request; None: closes the connection instead. `closes`: also behind the last one."""

    def __init__(self, *answers: bytes | None, closes: bool = False) -> None:
        self.answers = list(answers)
        self.closes = closes
        self.requests: list[bytes] = []
        self.num_connections = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head + await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])))
                answer = self.answers.pop(0)
                if answer is None:
                    break
                writer.write(answer)
                if self.closes and not self.answers:
                    break
        except (asyncio.IncompleteReadError, IndexError):
            pass
        writer.close()


def using(server: Server, use: Callable[[HttpClient], Awaitable[None]]) -> None:
    async def main() -> None:
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/under/", {"X-Mine": "1"})
        try:
            async with asyncio.timeout(20):
                await use(client)
        finally:
            client.close()
            listening.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def ask(client: HttpClient, body: bytes = b"") -> tuple[int, bytes]:
    pieces: list[bytes] = []
    status = await client.ask("POST", "/path", body, lambda status, piece: pieces.append(piece))
    return status, b"".join(pieces)


def test_requests_use_one_connection_one_after_the_other_and_more_at_a_time() -> None:
    server = Server(OK, CHUNKED, OK, OK)

    async def use(client: HttpClient) -> None:
        assert await ask(client, b"body") == (200, b"ok")
        assert await ask(client) == (404, b"none!")
        assert server.num_connections == 1
        assert await asyncio.gather(ask(client), ask(client)) == [(200, b"ok")] * 2
        assert server.num_connections == 2

    using(server, use)
    assert server.requests[0].startswith(b"POST /under/path HTTP/1.1\r\nHost: 127.0.0.1:")
    assert server.requests[0].endswith(b"\r\nX-Mine: 1\r\nContent-Length: 4\r\n\r\nbody")


def test_a_connection_closed_while_idle_is_no_fault_of_the_next_request() -> None:
    server = Server(OK, None, OK)

    async def use(client: HttpClient) -> None:
        assert await ask(client) == (200, b"ok")
        assert await ask(client) == (200, b"ok")

    using(server, use)
    assert server.num_connections == 2


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhal"


@pytest.mark.parametrize("answers", [(None,), (HALF,), (b"no HTTP\r\n\r\n",)])
def test_no_answer_or_half_of_one_is_an_error(answers: tuple[bytes | None, ...]) -> None:
    server = Server(*answers, closes=True)

    async def use(client: HttpClient) -> None:
        with pytest.raises(ConnectionError):
            await ask(client)

    using(server, use)


def test_what_the_taker_raises_is_raised() -> None:
    async def use(client: HttpClient) -> None:
        def take(status: int, piece: bytes) -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await client.ask("GET", "/", b"", take)

    using(Server(OK), use)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://["])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        HttpClient(url, {})
