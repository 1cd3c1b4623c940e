"""A real `mmv1 serve`, as a subprocess with a port of its own, and what a test wants to know of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.pictures import data_url

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 120.0
ENGINE = "mmv1.engine.core_process"
POOL = "mmv1.preprocess.pool_process"
CLIP = "mmv1.embedding.clip_process"
MAX_NUM_SEQS = 4  # of the server that all tests share
TEXT = "What is in this picture?"


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition()`, asked again and again."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


def process_exists(pid: int) -> bool:
    """Whether it runs; one that has ended and is not yet waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def children_of(pid: int) -> list[int]:
    """All processes below `pid`."""
    parents: dict[int, list[int]] = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(directory.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found[1:]


def private_mib(pid: int) -> float:
    """Memory that is this process's alone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in fields if line.startswith("RssAnon:")) / 1024
    return 0.0


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def listening_tcp_ports(pid: int) -> set[int]:
    """The TCP ports that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                inodes.add(match[1])
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: listening
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


class Server:
    """A running server. `log` is what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, model_dir: Path | None) -> None:
        self.process = process
        self.model_dir = model_dir or Path()
        self._log_path = log_path
        self.port = 0
        self.started: list[int] = []  # the processes below it, as of when it was ready
        self.http = httpx.Client(timeout=60.0)

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60.0)

    def wait_ready(self) -> None:
        def listening() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log
            return re.search(r"on http://127\.0\.0\.1:(\d+)", self.log)

        self.port = int(wait_until(listening, START_TIMEOUT_S, "the server listens")[1])
        wait_until(self.is_healthy, 10, "/health answers 200")
        self.started = children_of(self.process.pid)

    def is_healthy(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get(f"{self.url}/health").status_code == 200
        return False

    def post(self, body: Any, **options: Any) -> httpx.Response:
        """A chat request, `body` as JSON."""
        return self.http.post(f"{self.url}/v1/chat/completions", json=body, **options)

    def metrics(self) -> dict[str, float]:
        """Every sample without labels of its own, by name, less the prefix."""
        families = text_string_to_metric_families(self.http.get(f"{self.url}/metrics").text)
        return {sample.name.removeprefix("mmv1:"): sample.value for family in families for sample in family.samples}

    def memory_mib(self) -> float:
        """What it and its processes have private of it, slab and shared pages left out."""
        return sum(private_mib(pid) for pid in (self.process.pid, *children_of(self.process.pid)))

    def pid_of(self, module: str) -> int:
        (pid,) = [pid for pid in children_of(self.process.pid) if module in command_of(pid)]
        return pid

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(model_dir: Path | None, folder: Path, *options: str) -> Iterator[Server]:
    """`mmv1 serve MODEL_DIR` (None: without one) on a free port; ended, with all that came from it, at the end."""
    model = [] if model_dir is None else [str(model_dir)]
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmv1", "serve", *model, "--port", "0", "--served-model-name", "tiny", *options],
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    server = Server(process, log_path, model_dir)
    try:
        server.wait_ready()
        yield server
    finally:
        server.http.close()
        family = {process.pid, *children_of(process.pid), *server.started}
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.stop()
        for pid in family:
            if process_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def body(content: Any, **options: Any) -> dict[str, Any]:
    options = {"temperature": 0, "max_tokens": 8} | options
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **options}


def image(url: str | bytes, file_format: str = "JPEG") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url if isinstance(url, str) else data_url(url, file_format)}}


def text(words: str = TEXT) -> dict[str, str]:
    return {"type": "text", "text": words}


def ask(picture: str | bytes, words: str = TEXT, **options: Any) -> dict[str, Any]:
    return body([image(picture), text(words)], **options)
