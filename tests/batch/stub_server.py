"""A server with the face of OpenAI's API and no model: the same request gets the same answer, after a short while."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stub"


def reply_to(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class StubServer:
    """`asked`: how often each prompt came. `max_delay_s`: an answer takes up to that long, at random. `hold`: none is given
    before it is set."""

    def __init__(self, port: int = 0, max_delay_s: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        self.num_answered = 0
        self.num_connections = 0
        self.headers: list[dict[str, str]] = []
        self.max_delay_s = max_delay_s
        self.hold: threading.Event | None = None
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler_of(self), bind_and_activate=False)
        self._http.allow_reuse_address = self._http.daemon_threads = True
        self._http.server_bind()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def listen(self) -> None:
        self._http.request_queue_size = 512
        self._http.server_activate()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = str(body["messages"][0]["content"])
        with self._lock:
            self.asked[prompt] += 1
        if self.hold is not None:
            self.hold.wait(30)
        time.sleep(random.uniform(0, self.max_delay_s))
        if body["model"] != MODEL:
            return 404, {"error": {"message": f"no model {body['model']}", "type": "invalid_request_error", "code": None}}
        with self._lock:
            self.num_answered += 1
        message = {"role": "assistant", "content": reply_to(prompt)}
        return 200, {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL,
                     "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]}  # fmt: skip


def _handler_of(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            stub.num_connections += 1
            super().setup()

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": MODEL}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            stub.headers.append(dict(self.headers))
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*stub.answer(body))

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("x-request-id", "req-1")
            self.end_headers()
            with contextlib.suppress(OSError):  # the client was killed
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

    return Handler


@contextlib.contextmanager
def stub_server(**options: Any) -> Iterator[StubServer]:
    server = StubServer(**options)
    server.listen()
    try:
        yield server
    finally:
        server.close()
