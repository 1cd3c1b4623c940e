"""The front end alone: chat requests per second through HTTP, with an engine that answers at once.

    python benchmarks/front_end.py [--json FILE] [--rounds N]

The server is mmv1's own (uvloop, HTTP, validation, base64, header, hash, chat template, tokenizer, detokenizer, events) in a
process of its own, but for the engine's client, whose place a stub takes: it packs and unpacks the engine's messages as the
real one does, gives every running request one token a turn of the event loop, and never asks for pixels. What is missing is the
two sockets to the engine, and a vocabulary of 150,000 (the demo model's has 700). The client has a process of its own too, and
connections that stay open. Processor time is the server process's, all its threads.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httptools
import msgspec
import numpy as np
import uvloop
from environment import describe
from PIL import Image

from mmv1.types import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, EngineReady, FinishReason, Pong

NUM_CONNECTIONS = 16
NUM_PICTURES = 8
PICTURE_BYTES = 450_000
MAX_PIXELS = 1_100_000  # 1024x1024 stays about as large as it is: 1369 tokens
QUESTION = "Describe this picture: what is in it, how many of each, in which colours, and where do they stand? " * 2
# Of processor time, a request with a picture. One core then takes 207 requests/s, the most that the arithmetic of one H100
# leaves a 3B model with pictures of 448x448.
BUDGET_MS = 4.8


class Kind(NamedTuple):
    """One kind of request, and how many of them make a round."""

    name: str
    has_picture: bool
    num_tokens: int  # of the answer; streamed, one an event, when more than one
    num_requests: int
    num_connections: int = NUM_CONNECTIONS


KINDS = (
    Kind("text, 1 token", False, 1, 1500),
    Kind("text, 64 tokens streamed", False, 64, 200),
    Kind("picture, 1 token", True, 1, 500),
    Kind("picture, 64 tokens streamed", True, 64, 150),
    Kind("128 streams of 256 tokens", False, 256, 256, 128),
)


# ---- the server ---------------------------------------------------------------------------------------------------------


class StubClient:
    """In the place of mmv1.engine.client.EngineClient."""

    pid = None

    def __init__(self, on_outputs: Callable[[EngineCoreOutputs], None], on_death: Callable[[str], None]) -> None:
        self._on_outputs = on_outputs
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineCoreOutputs)
        self._remaining: dict[str, int] = {}
        self._stepping: asyncio.Task[None] | None = None

    async def start(self, config: Any, slab_fd: int) -> EngineReady:
        return EngineReady(max_model_len=config.model.max_model_len, num_kv_blocks=1, block_size=16, device="none", dtype="none")

    def send(self, message: Any) -> None:
        self._encoder.encode(message)
        if isinstance(message, EngineCoreRequest):
            self._remaining[message.request_id] = message.max_tokens
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step())

    async def _step(self) -> None:
        while self._remaining:
            outputs = []
            for request_id, remaining in list(self._remaining.items()):
                self._remaining[request_id] -= 1
                if remaining == 1:
                    del self._remaining[request_id]
                reason = FinishReason.LENGTH if remaining == 1 else None
                outputs.append(EngineCoreOutput(request_id, [300 + remaining % 256], reason))
            frame = self._encoder.encode(EngineCoreOutputs(outputs=outputs))
            self._on_outputs(self._decoder.decode(frame))
            await asyncio.sleep(0)

    async def check_health(self) -> None: ...

    async def ping(self) -> Pong:
        return Pong(0, 0.0)

    async def close(self) -> None: ...


def serve(listener: socket.socket) -> None:
    """mmv1's server until SIGTERM."""
    from mmv1.api import server
    from mmv1.config import EngineArgs, resolve
    from mmv1.engine import async_llm

    async_llm.EngineClient = StubClient

    async def main() -> None:
        llm = async_llm.AsyncLLM(resolve(EngineArgs(max_pixels=MAX_PIXELS, preprocess_workers=1, served_model_name="bench")))
        await llm.start()
        try:
            await server.serve(llm, listener)
        finally:
            await llm.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# ---- the client ---------------------------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    """A JPEG of 1024x1024 as large as a photograph's: colour fields, texture and grain, at the quality that gives the size."""
    rng = np.random.default_rng(seed)
    fields = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC)
    texture = Image.fromarray(rng.integers(0, 60, (256, 256, 3), dtype=np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 5, (1024, 1024, 1))
    pixels = np.asarray(Image.blend(fields, texture, 0.3)) + grain
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def encoded(quality: int) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return out.getvalue()

    qualities = range(50, 99)
    return encoded(qualities[bisect.bisect_left(qualities, PICTURE_BYTES, key=lambda quality: len(encoded(quality)))])


def request_of(kind: Kind, encoded: bytes) -> bytes:
    """The whole HTTP request."""
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if kind.has_picture:
        url = "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    options = {"max_tokens": kind.num_tokens, "temperature": 0, "stream": kind.num_tokens > 1, "ignore_eos": True}
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": content}], **options}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One request after the other; `num_events` counts the events of streams."""

    def __init__(self) -> None:
        self.num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[None] | None = None

    async def ask(self, request: bytes) -> None:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answer

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.num_events += body.count(b"data: ")

    def on_message_complete(self) -> None:
        assert self._answer is not None
        status = self._parser.get_status_code()
        if status == 200:
            self._answer.set_result(None)
        else:
            self._answer.set_exception(RuntimeError(f"the server answered {status}"))
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RuntimeError("the server closed a connection"))


def processor_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Round(NamedTuple):
    requests_per_s: float
    processor_ms: float  # of the server process, a request
    events: float  # a request


async def measure(connections: list[Connection], requests: list[bytes], number: int, pid: int) -> Round:
    """`number` requests, one at a time on each connection."""
    numbers = iter(range(number))

    async def work(connection: Connection) -> None:
        for i in numbers:
            await connection.ask(requests[i % len(requests)])

    events = sum(connection.num_events for connection in connections)
    before, started = processor_seconds(pid), time.perf_counter()
    await asyncio.gather(*map(work, connections))
    elapsed, spent = time.perf_counter() - started, processor_seconds(pid) - before
    events = sum(connection.num_events for connection in connections) - events
    return Round(number / elapsed, 1000 * spent / number, events / number)


async def connect(port: int, server: subprocess.Popen[bytes]) -> list[Connection]:
    loop = asyncio.get_running_loop()
    deadline = time.monotonic() + 120
    while True:
        try:
            most = max(kind.num_connections for kind in KINDS)
            return [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(most)]
        except ConnectionRefusedError:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not start")
            await asyncio.sleep(0.1)


Figures = dict[str, dict[str, float]]


async def run(port: int, server: subprocess.Popen[bytes], num_rounds: int) -> Figures:
    pictures = [picture(seed) for seed in range(NUM_PICTURES)]
    requests = {kind: [request_of(kind, encoded) for encoded in pictures] for kind in KINDS}
    largest = max(len(bodies[0]) for bodies in requests.values())
    print(f"body of a request with a picture: {largest / 1000:.0f} kB; {NUM_CONNECTIONS} connections")
    connections = await connect(port, server)
    for kind in KINDS:  # also while the slab is laid out, in the background
        await measure(connections[: kind.num_connections], requests[kind], kind.num_requests // 4, server.pid)
    rounds: dict[Kind, list[Round]] = {kind: [] for kind in KINDS}
    for _ in range(num_rounds):
        for kind in KINDS:
            rounds[kind].append(await measure(connections[: kind.num_connections], requests[kind], kind.num_requests, server.pid))
    for connection in connections:
        connection.close()
    figures = {}
    for kind in KINDS:
        median = Round(*map(statistics.median, zip(*rounds[kind], strict=True)))
        rates = {"requests_per_s_per_core": 1000 / median.processor_ms, "tokens_per_s": median.requests_per_s * kind.num_tokens}
        figures[kind.name] = {**median._asdict(), **rates}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(socket.socket(fileno=args.serve))
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        command = [sys.executable, __file__, "--serve", str(listener.fileno())]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        figures = uvloop.run(run(port, server, args.rounds))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    print(f"{'':30}{'requests/s':>12}{'processor ms each':>20}{'requests/s per core':>21}{'events each':>13}{'tokens/s':>10}")
    for name, figure in figures.items():
        goal = f"   (budget: {BUDGET_MS} ms)" if name.startswith("picture") else ""
        print(
            f"{name:30}{figure['requests_per_s']:12.0f}{figure['processor_ms']:20.2f}{figure['requests_per_s_per_core']:21.0f}"
            f"{figure['events']:13.1f}{figure['tokens_per_s']:10.0f}{goal}"
        )
    if args.json:
        args.json.write_text(json.dumps({**describe(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
