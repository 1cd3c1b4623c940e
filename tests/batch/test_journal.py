"""The journal: what is there after a kill at any byte, what is refused, how often the disk is waited for."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from mmv1.batch.journal import Journal
from mmv1.errors import ConfigError
from tests.preprocess.processes import wait_until

RECORDS = [{"key": "a", "text": "one"}, {"key": "b", "text": "line\nbreak, ü, \"quotes\""}, {"key": "c", "text": ""}]
BEGINS = b'{"key":"'


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def journal(path: Path, seen: list[dict[str, str]] | None = None) -> Journal:
    def on_line(line: bytes) -> None:
        record = msgspec.json.decode(line, type=dict[str, str])
        if seen is not None:
            seen.append(record)

    return Journal(path, on_line, begins=BEGINS)


def write(path: Path, records: list[dict[str, str]]) -> None:
    with_records = journal(path)
    for record in records:
        with_records.append(record)
    with_records.close()


def test_what_was_appended_is_read_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, RECORDS[:2])
    write(path, RECORDS[2:])
    seen: list[dict[str, str]] = []
    journal(path, seen).close()
    assert seen == RECORDS
    assert [json.loads(line) for line in lines_of(path)] == RECORDS


def test_a_file_torn_at_any_byte_loses_only_the_torn_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write(whole, RECORDS)
    data = whole.read_bytes()
    for length in range(len(data) + 1):
        torn = tmp_path / f"{length}.jsonl"
        torn.write_bytes(data[:length])
        complete = data[:length].count(b"\n")
        seen: list[dict[str, str]] = []
        opened = journal(torn, seen)
        assert seen == RECORDS[:complete], length
        for record in RECORDS[complete:]:
            opened.append(record)
        opened.close()
        assert torn.read_bytes() == data, length


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (b'{"key":"a","text":"on\n', "line 2, is damaged"),
        (b'{"key":"a","text":5}\n', "line 2, is damaged"),
        (b'{"key":"\xff"}\n', "line 2, is damaged"),
        (b"\n", "line 2, was not written by this command"),
        (b'{"other":1}\n', "line 2, was not written by this command"),
        (b"\0\0\0\0", "line 2, was not written by this command"),
        (b"half a line of a letter", "line 2, was not written by this command"),
    ],
)
def test_any_other_damage_is_an_error_and_nothing_is_changed(damaged: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, RECORDS[:1])
    after = msgspec.json.encode(RECORDS[1]) + b"\n" if damaged.endswith(b"\n") else b""
    data = path.read_bytes() + damaged + after
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        journal(path)
    assert path.read_bytes() == data


def test_a_strangers_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"model": "without a newline at its end"}')
    with pytest.raises(ConfigError, match="line 1, was not written"):
        journal(path)
    assert path.read_bytes() == b'{"model": "without a newline at its end"}'


def test_two_cannot_have_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = journal(path)
    with pytest.raises(ConfigError, match="another run"):
        journal(path)
    first.append(RECORDS[0])
    first.close()
    journal(path).close()
    assert len(lines_of(path)) == 1


def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused = [(tmp_path, "directory"), (tmp_path / "none" / "j", "No such file"), (tmp_path / "pipe", "no regular file")]
    for path, words in refused:
        with pytest.raises(ConfigError, match=words):
            journal(path)


def test_many_lines_share_an_fsync_and_none_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), fdatasync(fd)))
    path = tmp_path / "j.jsonl"
    opened = journal(path)
    start = time.monotonic()
    for _ in range(100):
        opened.append(RECORDS[0])
        time.sleep(0.002)
    wait_until(lambda: len(lines_of(path)) == 100, 5)  # nobody asked for it
    assert 1 <= len(calls) <= (time.monotonic() - start) / 0.04 + 1
    opened.close()


def test_appending_does_not_wait_for_the_disk_and_flush_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = threading.Event()
    entered = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda fd: (entered.set(), disk.wait(10)))
    opened = journal(tmp_path / "j.jsonl")
    opened.append(RECORDS[0])
    assert entered.wait(5)
    opened.append(RECORDS[1])
    flushed = threading.Event()
    flushing = threading.Thread(target=lambda: (opened.flush(), flushed.set()))
    flushing.start()
    assert not flushed.wait(0.2)
    disk.set()
    flushing.join(5)
    assert flushed.is_set() and len(lines_of(tmp_path / "j.jsonl")) == 2
    opened.close()


def test_flush_does_not_wait_for_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmv1.batch.journal._GROUP_S", 60.0)
    opened = journal(tmp_path / "j.jsonl")
    for record in RECORDS:
        opened.append(record)
        opened.flush()
    assert len(lines_of(tmp_path / "j.jsonl")) == 3
    opened.close()


def test_a_full_disk_is_told_and_what_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    write(path, RECORDS[:1])
    opened = journal(path)

    def write_half(fd: int, data: memoryview) -> int:
        if len(data) > 10:
            return real_write(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    real_write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_half)
        opened.append({"key": "0123456"})
        with pytest.raises(ConfigError, match="No space left on device"):
            opened.flush()
    with pytest.raises(ConfigError, match="No space left on device"):
        opened.append(RECORDS[1])
    with pytest.raises(ConfigError, match="No space left on device"):
        opened.close()
    seen: list[dict[str, str]] = []
    journal(path, seen).close()  # the lock is gone with the one before, and so is the torn line
    assert seen == RECORDS[:1]


def test_a_file_that_was_renamed_before_it_was_locked_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "a.jsonl", fcntl.flock

    def rename_first(fd: int, how: int) -> None:
        path.rename(tmp_path / "a.jsonl.previous-1")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    with pytest.raises(ConfigError, match="renamed by another run"):
        Journal(path, print)
