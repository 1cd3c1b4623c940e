"""What the tests of real processes share: one engine and one server with default settings, on the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmv1.engine.llm import LLM
from tests.integration.server import ENGINE, MAX_NUM_SEQS, Server, body, serving
from tests.integration.web import Web, running_web


@pytest.fixture(scope="session")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    """Its caches hold what earlier tests left: `forget_caches` empties them."""
    with LLM(tiny_model_dir) as started:
        yield started


@pytest.fixture(scope="session")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--max-num-seqs", str(MAX_NUM_SEQS), "--allowed-media-domains", "127.0.0.1")
    with serving(tiny_model_dir, tmp_path_factory.mktemp("server"), *options) as started:
        yield started


@pytest.fixture(scope="session")
def engine_pid(server: Server) -> int:
    return server.pid_of(ENGINE)


@pytest.fixture
def still_good(server: Server, engine_pid: int) -> Iterator[None]:
    """After the test the same engine answers the next good request."""
    yield
    assert server.post(body("Hello", max_tokens=1)).status_code == 200
    assert server.pid_of(ENGINE) == engine_pid


@pytest.fixture(scope="session")
def web() -> Iterator[Web]:
    with running_web() as running:
        yield running
