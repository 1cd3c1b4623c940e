"""The services of docker-compose.yml, run by their own commands: Redis with the arguments it is given there, and mmv1 with the
image's entry point, environment and health check. For want of a container engine, one host name and two ports are replaced.

By default mmv1 is the one of this environment. With MMV1_TEST_INSTALL=1 the Dockerfile is carried out first, step by step,
downloads included, and mmv1 is what it installed, run as it would be in its container (container.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.docker.compose import SERVICES
from tests.docker.container import BASE_PATH, Image, why_not
from tests.docker.dockerfile import ROOT, Stage, read_dockerfile
from tests.docker.monitoring import dashboard_queries, unanswered
from tests.integration.server import children_of, process_exists, wait_until
from tests.pictures import data_url
from tests.redis_server import BINARY, MISSING

Command = Callable[[list[str], Mapping[str, str]], subprocess.Popen[bytes]]

QUESTION = "Describe this image."
ANSWER = "a small yellow star, a large orange triangle, a small black square and a small blue triangle"  # README, make demo


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Stack:
    """Redis and mmv1. `run` starts a command of the image in the image's environment."""

    def __init__(self, image: Stage, run: Command) -> None:
        self._image = image
        self._run = run
        self.port, self.redis_port = free_port(), free_port()

    @contextmanager
    def redis(self, directory: Path) -> Iterator[None]:
        assert BINARY is not None, MISSING
        service = SERVICES["redis"]
        program, *arguments = service["command"]
        assert program == "redis-server"
        process = subprocess.Popen([BINARY, *arguments, "--port", str(self.redis_port), "--bind", "127.0.0.1"], cwd=directory)
        try:
            wait_until(lambda: self.redis_says(*service["healthcheck"]["test"][2:]) == "PONG", 20, "Redis is healthy")
            yield
        finally:
            process.terminate()
            process.wait(timeout=20)
        assert not list(directory.iterdir()), "a cache writes nothing to disk"

    def redis_says(self, *words: str) -> str:
        asked = subprocess.run(["redis-cli", "-p", str(self.redis_port), *words], capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    @contextmanager
    def mmv1(self) -> Iterator[httpx.Client]:
        """A client of the service, once its health check says yes. Ends within the service's grace, with nothing left behind."""
        service = SERVICES["mmv1"]
        redis = f"127.0.0.1:{self.redis_port}"
        env = {name: value.replace("redis:6379", redis) for name, value in service["environment"].items()}
        assert not self._is_healthy(env), "nothing runs yet"
        process = self._run([*self._here(self._image.entrypoint), *service.get("command", [])], env)
        try:

            def healthy() -> bool:
                assert process.poll() is None, "it ended"
                return self._is_healthy(env)

            wait_until(healthy, 120, "mmv1 is healthy")
            started = [process.pid, *children_of(process.pid)]
            with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
                yield client
            (server,) = [pid for pid in started if b"mmv1\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(server, signal.SIGTERM)  # as `docker stop`: to the container's first process
            assert process.wait(timeout=float(service["stop_grace_period"].removesuffix("s"))) == 0
            wait_until(lambda: not any(map(process_exists, started)), 10, "all its processes have ended")
        finally:
            for pid in (*children_of(process.pid), process.pid):
                if process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def _is_healthy(self, env: Mapping[str, str]) -> bool:
        return self._run(self._here(self._image.healthcheck), env).wait(timeout=30) == 0

    def _here(self, command: list[str]) -> list[str]:
        return [word.replace(self._image.notes["EXPOSE"], str(self.port)) for word in command]


def ask(client: httpx.Client) -> str:
    picture = (ROOT / "examples" / "pictures" / "shapes.jpg").read_bytes()
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": QUESTION}]
    body = {"model": "qwen2.5-vl-demo", "messages": [{"role": "user", "content": content}], "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def metric(client: httpx.Client, name: str) -> float:
    samples = [sample for family in text_string_to_metric_families(client.get("/metrics").text) for sample in family.samples]
    (value,) = [sample.value for sample in samples if sample.name == f"mmv1:{name}"]
    return value


def check_stack(stack: Stack, directory: Path) -> None:
    """A picture is decoded once, however often mmv1 is restarted; and the dashboard has its figures."""
    directory.mkdir()
    with stack.redis(directory):
        names = ("maxmemory", "maxmemory-policy", "save")
        settings = {name: stack.redis_says("CONFIG", "GET", name).splitlines()[1:] for name in names}
        assert settings == {"maxmemory": [str(1 << 30)], "maxmemory-policy": ["allkeys-lru"], "save": []}
        with stack.mmv1() as client:
            assert ask(client) == ANSWER
            assert metric(client, "preprocess_decodes_total") == 1
            wait_until(lambda: metric(client, "preprocess_store_saves_total") == 1, 10, "the picture is in Redis")
        with stack.mmv1() as client:
            assert ask(client) == ANSWER
            assert (metric(client, "preprocess_decodes_total"), metric(client, "preprocess_store_hits_total")) == (0, 1)
            metrics = client.get("/metrics").text
    assert unanswered(metrics) == []
    # The check itself fails when a figure is renamed, a label is, or a value.
    assert unanswered(metrics.replace("mmv1:time_to_first_token", "mmv1:ttft"))
    assert unanswered(metrics.replace("finished_reason", "reason"))
    assert unanswered(metrics.replace('stage="store_set"', 'stage="save"'))
    assert sum(map(len, dashboard_queries().values())) > 30


@pytest.mark.slow
def test_stack_of_this_environment(tmp_path: Path) -> None:
    _, image = read_dockerfile({"PATH": BASE_PATH})
    home, scratch = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    scratch.mkdir()

    def run(command: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        bin_dir = str(Path(sys.executable).parent)
        env = {**image.env, "PATH": image.env["PATH"].replace("/opt/mmv1/bin", bin_dir), **env}
        env |= {"HOME": str(home), "HF_HOME": str(home), "TMPDIR": str(scratch)}
        return subprocess.Popen([f"{bin_dir}/{command[0]}", *command[1:]], env=env, cwd=home)

    check_stack(Stack(image, run), tmp_path / "redis")
    assert not list(home.iterdir()), "the container's file system is read-only but for /tmp"
    assert not list(scratch.iterdir()), "nothing is left in /tmp"


@pytest.fixture
def image_dir(tmp_path: Path) -> Iterator[Path]:
    """Gigabytes that do not stay."""
    yield tmp_path / "images"
    shutil.rmtree(tmp_path / "images")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("MMV1_TEST_INSTALL") != "1", reason="installs gigabytes; MMV1_TEST_INSTALL=1 asks for it")
def test_stack_of_the_dockerfile(image_dir: Path, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.fail(f"MMV1_TEST_INSTALL=1 asks for a container, and that {reason}")
    cache = Path(os.environ.get("UV_CACHE_DIR", Path.home() / ".cache" / "uv"))
    cache.mkdir(parents=True, exist_ok=True)
    images: dict[str, Image] = {}
    for stage in read_dockerfile({"PATH": BASE_PATH}):
        image = images[stage.name] = Image(image_dir / (stage.name or "final"))
        image.build(stage, images=images, uv_cache=cache)
    packages = (image.root / "opt" / "mmv1").glob("lib/python*/site-packages/*.dist-info")
    installed = {path.name.partition("-")[0] for path in packages}
    assert {"mmv1", "torch", "transformers"} <= installed
    assert not installed & {"pytest", "ruff", "mypy", "openai", "torchvision", "hatchling"}, "what only developers need"

    def run(command: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(image.run_command(command, stage, env, SERVICES["mmv1"]["tmpfs"]))

    check_stack(Stack(stage, run), tmp_path / "redis")
