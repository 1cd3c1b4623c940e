"""Sinks and the recorder: what a run that is killed between any two steps leaves, and what the next one makes of it."""

from __future__ import annotations

import asyncio
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmv1.batch.caption_log import CaptionLog, Errors, Row, write_whole
from mmv1.batch.sinks import JsonlSink, ParquetSink, Recorder, ShardSink, SidecarSink, Sink
from mmv1.batch.sources import Sample
from mmv1.errors import ConfigError
from tests.pictures import make_image

PICTURE = make_image(8, 8)


class Killed(BaseException):
    """As after a SIGKILL, nothing that the run would still have done is done."""


def make_sink(kind: str, log: CaptionLog, folder: Path) -> Sink:
    if kind == "sidecars":
        return SidecarSink(log, ".txt", written_before={"old.jpg"}, replaces_all=False)
    if kind == "shards":
        return ShardSink(folder, "", 2)
    return JsonlSink(log) if kind == "jsonl" else ParquetSink(log, folder / "a.parquet")


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[tuple[CaptionLog, Sink]]:
    log = CaptionLog(folder / "captions.jsonl")
    try:
        yield log, make_sink(kind, log, folder)
    finally:
        log.close()


def sample_of(folder: Path, name: str) -> Sample:
    (folder / name).write_bytes(PICTURE)
    return Sample(name, folder / name)


def row_of(sample: Sample, caption: str = "new") -> Row:
    return {"key": sample.key, "caption": caption, "blake3": "00" * 16}


def record(log: CaptionLog, sink: Sink, *samples: Sample) -> None:
    async def record_all() -> None:
        recorder = Recorder(log, sink)
        await asyncio.gather(*(recorder.record(sample, row_of(sample), PICTURE) for sample in samples))

    asyncio.run(record_all())


KILLS: list[tuple[str, Callable[[Any, Any], tuple[Any, str]]]] = [
    ("before the log", lambda log, sink: (log, "append")),
    ("between log and sink", lambda log, sink: (sink, "write")),
    ("while the file is made whole", lambda log, sink: (os, "replace")),
]


@pytest.mark.parametrize("kind", ["sidecars", "jsonl", "parquet", "shards"])
@pytest.mark.parametrize(("where", "target"), KILLS, ids=[where for where, _ in KILLS])
def test_killed_anywhere_the_next_run_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str, target: Callable[[Any, Any], tuple[Any, str]]
) -> None:
    samples = [sample_of(tmp_path, name) for name in ("a.jpg", "old.jpg", "b.jpg")]
    (tmp_path / "old.txt").write_text("a caption of another prompt")
    with opened(kind, tmp_path) as (log, sink), monkeypatch.context() as patch:

        def kill(*_: object) -> None:
            raise Killed

        patch.setattr(*target(log, sink), kill)
        try:
            record(log, sink, *samples)
            sink.close()
        except Killed:
            pass
    if kind == "sidecars":
        assert (tmp_path / "old.txt").exists() is False or (tmp_path / "old.txt").read_text() == "new\n"
    with opened(kind, tmp_path) as (log, sink):
        todo = [sample for sample in samples if not sink.is_done(sample)]
        record(log, sink, *todo)
        sink.close()
    with opened(kind, tmp_path) as (log, sink):
        assert all(sink.is_done(sample) for sample in samples)
        assert sorted(row["key"] for row in log.rows()) == ["a.jpg", "b.jpg", "old.jpg"]  # once each
    if kind == "sidecars":
        assert {path.read_text() for path in tmp_path.glob("*.txt")} == {"new\n"} and len(list(tmp_path.glob("*.txt"))) == 3
    assert not list(tmp_path.glob(".*unfinished")) or kind == "shards"


def test_an_unfinished_file_is_never_seen_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    seen = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append((tmp_path / "a").read_text()), real(fd)))
    write_whole(tmp_path / "a", b"new")
    assert seen == ["old"] and (tmp_path / "a").read_text() == "new"


def test_rows_that_come_together_are_written_together(tmp_path: Path) -> None:
    samples = [sample_of(tmp_path, f"{number}.jpg") for number in range(20)]
    groups: list[int] = []
    with opened("jsonl", tmp_path) as (log, sink):
        append = log.append
        log.append = lambda rows: (groups.append(len(rows)), append(rows))[1]  # type: ignore[method-assign]
        record(log, sink, *samples)
    assert sum(groups) == 20 and len(groups) <= 2


def test_what_is_being_written_is_finished_when_nobody_waits_for_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sample_of(tmp_path, "a.jpg")

    async def give_up(log: CaptionLog, sink: Sink) -> None:
        recorder = Recorder(log, sink)
        write = sink.write
        going_on, may_go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slow(*row: Any) -> None:
            loop.call_soon_threadsafe(going_on.set)
            may_go_on.wait(10)
            write(*row)

        monkeypatch.setattr(sink, "write", slow)
        recording = asyncio.ensure_future(recorder.record(sample, row_of(sample), PICTURE))
        await asyncio.wait_for(going_on.wait(), 10)
        recording.cancel()
        may_go_on.set()
        await recorder.finish()
        assert (tmp_path / "a.txt").read_text() == "new\n"

    with opened("sidecars", tmp_path) as (log, sink):
        asyncio.run(give_up(log, sink))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sample_of(tmp_path, "a.jpg")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "a.txt")

    with opened("sidecars", tmp_path) as (log, sink):
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(ConfigError, match=r"a.txt cannot be written \(No space left on device\)"):
            record(log, sink, sample)


def test_log_finds_rows_by_key_and_by_bytes_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    log = CaptionLog(path)
    log.append([{"key": "a", "caption": "é", "blake3": "aa"}, {"key": "b", "caption": "two", "blake3": "bb"}])
    log.close()
    with path.open("ab") as file:
        file.write(b'{"key":"torn","cap')
    for _ in range(2):
        log = CaptionLog(path)
        assert log.keys == {"a", "b"} and log.of_picture("torn") is None
        assert log.of_picture("aa") == {"key": "a", "caption": "é", "blake3": "aa"}
        assert [row["key"] for row in log.rows()] == ["a", "b"]
        log.close()


def test_a_shard_that_could_not_be_written_to_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full in the middle of a member; then there is room again."""
    samples = [sample_of(tmp_path, f"{name}.jpg") for name in "abc"]
    with opened("shards", tmp_path) as (log, sink):
        record(log, sink, samples[0])
        real = tarfile.TarFile.addfile

        def torn(archive: tarfile.TarFile, member: tarfile.TarInfo, data: Any) -> None:
            if member.name.endswith(".txt"):
                archive.fileobj.write(bytes(700))  # type: ignore[union-attr]
                raise OSError(28, "No space left on device")
            real(archive, member, data)

        with monkeypatch.context() as patch:
            patch.setattr(tarfile.TarFile, "addfile", torn)
            with pytest.raises(ConfigError, match="No space left"):
                record(log, sink, samples[1])
        sink.close()
    with opened("shards", tmp_path) as (log, sink):
        record(log, sink, *(sample for sample in samples if not sink.is_done(sample)))
        sink.close()
    found: dict[str, int] = {}
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as archive:
            assert len(archive.getnames()) % 3 == 0
            for name in archive.getnames()[2::3]:
                key = json.load(archive.extractfile(name))["key"]  # type: ignore[arg-type]
                found[key] = found.get(key, 0) + 1
    assert found == {"a.jpg": 1, "b.jpg": 1, "c.jpg": 1}


def test_a_picture_of_a_format_that_only_the_server_knows_goes_into_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.AVIF").write_bytes(b"no format known here")
    sample = Sample("a.AVIF", tmp_path / "a.AVIF")

    async def write(sink: Sink, log: CaptionLog) -> None:
        await Recorder(log, sink).record(sample, row_of(sample), b"no format known here")

    with opened("shards", tmp_path) as (log, sink):
        asyncio.run(write(sink, log))
        sink.close()
    with tarfile.open(tmp_path / "00000.tar") as archive:
        assert archive.getnames()[0] == "0000000000.avif"


def test_the_longest_of_file_names(tmp_path: Path) -> None:
    name = f"{'é' * 125}n.jpg"  # 255 bytes, the most there can be
    with opened("sidecars", tmp_path) as (log, sink):
        record(log, sink, sample_of(tmp_path, name))
    assert (tmp_path / name).with_suffix(".txt").read_text() == "new\n"


def test_errors_that_cannot_be_written_down_are_one_sentence() -> None:
    errors = Errors(Path("/dev/full"))
    with pytest.raises(ConfigError, match=r"/dev/full cannot be written \(No space left on device\)"):
        errors.write("a", "b", "c")


def test_somebody_elses_errors_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "errors.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match="was not written by this command"):
        Errors(tmp_path / "errors.jsonl")
    assert (tmp_path / "errors.jsonl").read_text() == '{"mine": 1}\n'
