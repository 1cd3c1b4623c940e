"""A small web server for pictures that are named by URL."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """`files` are what it has, by path; `headers` what it says with some of them, a Location making a redirect of it. It never
    answers for `/never`, and notes when somebody asked and when they left."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.asked_for_never = threading.Event()
        self.left = threading.Event()


@contextlib.contextmanager
def running_web() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/never":
                web.asked_for_never.set()
                self.connection.recv(1)  # returns when the other side closes
                web.left.set()
                return
            found = self.path in web.files
            headers = web.headers.get(self.path, {})
            self.send_response(302 if "Location" in headers else 200 if found else 404)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(web.files.get(self.path, b""))

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        web = Web(f"http://127.0.0.1:{httpd.server_port}")
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield web
        httpd.shutdown()
