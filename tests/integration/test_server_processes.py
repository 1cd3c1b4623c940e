"""When processes hang, die or are told to end: clients are told, the server says so by its status, and nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.integration.server import (
    ENGINE,
    POOL,
    Server,
    ask,
    body,
    children_of,
    command_of,
    process_exists,
    serving,
    wait_until,
)
from tests.pictures import make_image

pytestmark = pytest.mark.slow


@pytest.fixture
def own_server(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Server]:
    """A server for this test alone, which may break it."""
    with serving(tiny_model_dir, tmp_path) as started:
        yield started


def endless(**options: object) -> dict[str, object]:
    return body("Hello", max_tokens=4000, ignore_eos=True, **options)


def decoders_of(server: Server) -> list[int]:
    """The pool's processes that a picture can kill: those below another one of the pool."""
    pool = [pid for pid in children_of(server.process.pid) if POOL in command_of(pid)]
    return [pid for parent in pool for pid in children_of(parent)] or pool


def test_an_engine_that_hangs_and_one_that_dies(own_server: Server) -> None:
    server = own_server
    engine = server.pid_of(ENGINE)
    os.kill(engine, signal.SIGSTOP)
    try:
        wait_until(lambda: not server.is_healthy(), 5, "/health notices that the engine hangs")
        answer = server.http.get(f"{server.url}/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    finally:
        os.kill(engine, signal.SIGCONT)
    wait_until(server.is_healthy, 5, "/health notices that the engine goes on")
    assert server.post(body("Hello")).status_code == 200

    with ThreadPoolExecutor(2) as threads:
        whole, events = threads.submit(server.post, endless()), threads.submit(server.post, endless(stream=True))
        wait_until(lambda: server.metrics()["num_requests_running"] == 2, 10, "both run")
        os.kill(engine, signal.SIGKILL)
        assert whole.result(10).status_code == 503
        assert whole.result().json()["error"]["code"] == "engine_unavailable"
        *_, last = [line for line in events.result(10).text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert server.process.wait(10) not in (0, None)
    wait_until(lambda: not any(map(process_exists, server.started)), 5, "nothing stays behind")


def test_a_decoder_that_dies_is_replaced(own_server: Server) -> None:
    server = own_server
    assert server.post(ask(make_image(90, 90, seed=1))).status_code == 200
    for pid in decoders_of(server):
        os.kill(pid, signal.SIGKILL)
    assert server.post(ask(make_image(90, 90, seed=2))).status_code == 200
    assert server.post(ask(make_image(90, 90, seed=3))).status_code == 200
    assert server.metrics()["preprocess_worker_deaths_total"] >= 1
    assert server.is_healthy()


def test_a_server_that_is_told_to_end_finishes_what_it_answers(own_server: Server) -> None:
    server = own_server
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, body("Hello", max_tokens=300, ignore_eos=True))
        wait_until(lambda: server.metrics()["num_requests_running"] == 1, 10, "it runs")
        server.process.send_signal(signal.SIGTERM)
        assert answer.result(20).json()["usage"]["completion_tokens"] == 300
    assert server.process.wait(15) == 0
    with pytest.raises(httpx.ConnectError):
        server.http.get(f"{server.url}/health")
    wait_until(lambda: not any(map(process_exists, server.started)), 5, "nothing stays behind")


def test_nothing_survives_a_server_that_is_killed(own_server: Server) -> None:
    server = own_server
    assert len(server.started) >= 2
    commands = " ".join(map(command_of, server.started))
    socket_dirs = {Path(found) for found in re.findall(r"[\w/]*/mmv1-\w+", commands)}
    assert len(socket_dirs) == 2
    assert all(path.is_dir() for path in socket_dirs)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, endless())
        wait_until(lambda: server.metrics()["num_requests_running"] == 1, 10, "the engine works")
        server.process.kill()
        server.process.wait(5)
        wait_until(lambda: not any(map(process_exists, server.started)), 5, "engine and pool are gone")
        assert not any(path.exists() for path in socket_dirs)
        assert isinstance(answer.exception(5), httpx.TransportError)


def test_what_a_server_cannot_finish_in_its_time_ends_with_a_word(tiny_model_dir: Path, tmp_path: Path) -> None:
    """And until then whoever comes is sent elsewhere."""
    with serving(tiny_model_dir, tmp_path, "--shutdown-timeout", "1.5") as server:
        with ThreadPoolExecutor(2) as threads:
            whole, events = threads.submit(server.post, endless()), threads.submit(server.post, endless(stream=True))
            wait_until(lambda: server.metrics()["num_requests_running"] == 2, 10, "both run")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not server.is_healthy(), 5, "/health says that it ends")
            turned_away = server.post(body("Hello"))
            assert (turned_away.status_code, turned_away.json()["error"]["code"]) == (503, "shutting_down")
            assert not (whole.done() or events.done())
            assert (whole.result(10).status_code, whole.result().json()["error"]["code"]) == (503, "shutting_down")
            *_, last = [line for line in events.result(10).text.splitlines() if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.process.wait(15) == 0
        assert "Traceback" not in server.log
        wait_until(lambda: not any(map(process_exists, server.started)), 5, "nothing stays behind")
