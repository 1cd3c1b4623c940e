"""Killed with SIGKILL at random moments and started again, the output is that of a run that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.batch.captioning import make_pictures, rows, sidecars
from tests.integration.server import ROOT, Server, children_of, process_exists, serving, wait_until

pytestmark = pytest.mark.slow

NUM_PICTURES = 150
FLAGS = ("--max-tokens", "6", "--max-inflight", "6")


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_model_dir, tmp_path_factory.mktemp("server"), "--max-num-seqs", "8") as started:
        yield started


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Captions by key, of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_all(folder / "p")
    assert command(folder, "--url", server.url, "--output", "a.jsonl").wait(60) == 3
    captions = {row["key"]: row["caption"] for row in rows(folder / "a.jsonl")}
    assert len(captions) == NUM_PICTURES + 3 and len({*captions.values()}) > NUM_PICTURES // 2
    return captions


def make_all(folder: Path) -> None:
    """Different ones, three copies, and one that is no picture."""
    made = make_pictures(folder, NUM_PICTURES)
    for number in range(3):
        (folder / f"copy{number}.png").write_bytes(made["001.png"])
    (folder / "bad.png").write_bytes(b"no picture")


def command(folder: Path, *argv: str) -> subprocess.Popen[bytes]:
    """In a session of its own; `python -P`, for the folder it runs in is full of other things."""
    line = [sys.executable, "-P", "-m", "mmv1", "caption", "p", *FLAGS, *argv]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(line, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, stdout=log, stderr=log)


def captions_in_sidecars(folder: Path) -> dict[str, str]:
    by_stem = {path.relative_to(folder / "p").with_suffix("").as_posix(): path for path in (folder / "p").rglob("*.*g")}
    return {by_stem[stem].relative_to(folder / "p").as_posix(): text[:-1] for stem, text in sidecars(folder / "p").items()}


def captions_in_jsonl(folder: Path) -> dict[str, str]:
    found = rows(folder / "a.jsonl")
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row["caption"] for row in found}


def captions_in_shards(folder: Path) -> dict[str, str]:
    found = []
    for path in (folder / "out").glob("*.tar"):
        with tarfile.open(path) as archive:
            found += [json.load(archive.extractfile(name)) for name in archive.getnames() if name.endswith("json")]  # type: ignore[arg-type]
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row["caption"] for row in found}


def num_lines(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().count(b"\n")
    return 0


def kill_and_resume(folder: Path, log: str, num_kills: int, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Each kill comes some rows after the run began to write, so that all of them fall into the work, none at its end."""
    rng = random.Random(num_kills)
    most = NUM_PICTURES // num_kills - 1
    for _ in range(num_kills):
        target = num_lines(folder / log) + rng.randint(0, most - 1)
        process = start()
        wait_until(lambda target=target: num_lines(folder / log) > target, 30, "the run goes on")  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.02))
        assert process.poll() is None, "the run ended before it could be killed"
        family = [process.pid, *children_of(process.pid)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda family=family: not any(map(process_exists, family)), 20, "all its processes end")  # type: ignore[misc]
    assert start().wait(60) == 3  # the one that is no picture
    (error,) = rows(folder / ("p/errors.jsonl" if "p/" in log else "out/errors.jsonl" if "out/" in log else "a.errors.jsonl"))
    assert error["key"] == "bad.png"


@pytest.mark.parametrize(
    ("output", "log", "num_kills", "read"),
    [
        ((), "p/captions.jsonl", 20, captions_in_sidecars),
        (("--output", "a.jsonl"), "a.jsonl", 5, captions_in_jsonl),
        (("--output", "wds:out", "--samples-per-shard", "20"), "out/captions.jsonl", 5, captions_in_shards),
    ],
    ids=["sidecars", "jsonl", "webdataset"],
)
def test_killed_and_resumed_against_a_server(
    server: Server, expected: dict[str, str], tmp_path: Path,
    output: tuple[str, ...], log: str, num_kills: int, read: Callable[[Path], dict[str, str]],
) -> None:  # fmt: skip
    make_all(tmp_path / "p")
    kill_and_resume(tmp_path, log, num_kills, lambda: command(tmp_path, "--url", server.url, *output))
    assert read(tmp_path) == expected
    assert command(tmp_path, "--url", server.url, *output).wait(60) == 3 and read(tmp_path) == expected
    assert not [path for path in tmp_path.rglob("*unfinished*") if path.suffix != ".tar"]


def test_killed_and_resumed_with_an_engine_of_its_own(tiny_model_dir: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """The engine and the pool end with the process that is killed."""
    make_all(tmp_path / "p")
    kill_and_resume(tmp_path, "p/captions.jsonl", 2, lambda: command(tmp_path, "--model", str(tiny_model_dir)))
    assert captions_in_sidecars(tmp_path) == expected


def test_interrupted_it_finishes_what_is_under_way_and_says_how_to_go_on(
    server: Server, expected: dict[str, str], tmp_path: Path
) -> None:
    make_all(tmp_path / "p")
    process = command(tmp_path, "--url", server.url)
    wait_until(lambda: num_lines(tmp_path / "p/captions.jsonl") > 10, 30, "the run goes on")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    done = num_lines(tmp_path / "p/captions.jsonl")
    assert 10 < done < len(expected) and len(sidecars(tmp_path / "p")) == done
    told = (tmp_path / "log.txt").read_text()
    assert f"{done} pictures captioned" in told and "The rest, with the same command: mmv1 caption p" in told
    assert command(tmp_path, "--url", server.url).wait(60) == 3 and captions_in_sidecars(tmp_path) == expected
