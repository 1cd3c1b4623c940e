"""What is known of an output: the log of every caption, the settings it was made with, what failed; all in files beside it.

The log is a journal (journal.py), on disk before anything else is made of a caption, so that a run can be killed at any moment
and the next one goes on from there. Knows nothing of models, nor of the formats of outputs.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
from blake3 import blake3

from mmv1.batch.journal import Journal
from mmv1.errors import ConfigError

# Of one sample: key, caption, blake3 of the picture's bytes; captions and scores where there are several or they are ranked.
Row = dict[str, Any]


class Files(NamedTuple):
    """`log` is the output itself when that is JSONL."""

    log: Path
    settings: Path
    errors: Path

    @classmethod
    def beside(cls, place: Path, shard: str) -> Files:
        """Of the output at `place`: a folder, or a file. `shard`: "", or what sets apart runs that share the work: "0-of-4"."""
        part = f".{shard}" if shard else ""
        if place.is_dir():
            stem, errors = place / "captions", place / "errors"
        else:
            stem = place.with_name(place.name.removesuffix(".jsonl"))
            errors = stem.with_name(f"{stem.name}.errors")
        return cls(Path(f"{stem}{part}.jsonl"), Path(f"{stem}{part}.settings.json"), Path(f"{errors}{part}.jsonl"))


class _Indexed(msgspec.Struct):
    """What is kept in memory of a row."""

    key: str
    blake3: str


class CaptionLog:
    """The rows of a journal, found by key and by the picture's bytes. In memory: keys, digests and places, no captions.

    One thread appends; any may read.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is no such log, and when another run has it."""
        self._path = path
        self.keys: set[str] = set()
        self._places: dict[str, tuple[int, int]] = {}  # by blake3: offset and length of a row
        self._end = 0
        self._journal = Journal(path, self._read_line, begins=b'{"key":')
        self._fd = os.open(path, os.O_RDONLY)

    def append(self, rows: Sequence[Row]) -> None:
        """On disk when it returns. Raises ConfigError when that cannot be."""
        lines = [msgspec.json.encode(row) for row in rows]
        for line in lines:
            self._journal.append(msgspec.Raw(line))
        self._journal.flush()
        for row, line in zip(rows, lines, strict=True):
            self._index(row["key"], row["blake3"], len(line) + 1)

    def of_picture(self, blake3: str) -> Row | None:
        """A row of a picture with these bytes."""
        if (place := self._places.get(blake3)) is None:
            return None
        offset, length = place
        row: Row = msgspec.json.decode(os.pread(self._fd, length, offset))
        return row

    def has(self, row: Row) -> bool:
        """Whether its key is there, and the picture's bytes, of this or another key."""
        return row["key"] in self.keys and row["blake3"] in self._places

    def rows(self) -> Iterator[Row]:
        with self._path.open("rb") as lines:
            for line in lines:
                yield msgspec.json.decode(line)

    def close(self) -> None:
        os.close(self._fd)
        self._journal.close()

    def _read_line(self, line: bytes) -> None:
        row = msgspec.json.decode(line, type=_Indexed)
        self._index(row.key, row.blake3, len(line))

    def _index(self, key: str, blake3: str, length: int) -> None:
        self.keys.add(key)
        self._places[blake3] = (self._end, length)
        self._end += length


def keys_set_aside(log: Path) -> set[str]:
    """Of all logs that this one has taken the place of. Raises ConfigError."""
    keys: set[str] = set()
    for name in sorted(glob.glob(f"{glob.escape(str(log))}.previous-*")):
        with open(name, "rb") as lines:
            keys.update(msgspec.json.decode(line, type=_Indexed).key for line in lines if line.endswith(b"\n"))
    return keys


class Errors:
    """Pictures that have no caption and why, one JSON object a line; of this run only, for the next one tries them again."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for somebody else's file, OSError."""
        self.path = path
        self.count = 0
        if path.is_file() and not (b'{"key":').startswith(path.read_bytes()[:7]):
            raise ConfigError(f"{path} was not written by this command: give it another name, or give another --output")
        self._file = path.open("wb", buffering=0)

    def write(self, key: str, code: str, message: str) -> None:
        """Raises ConfigError when it cannot be written."""
        self.count += 1
        try:
            self._file.write(msgspec.json.encode({"key": key, "code": code, "message": message}) + b"\n")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}): run again to go on") from error

    def close(self) -> None:
        """Without an error there is no file."""
        self._file.close()
        if not self.count:
            self.path.unlink(missing_ok=True)


# ---- settings ----


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """`work`: all that a caption depends on. `replaces_all`: sidecars of unknown origin are to be replaced (--overwrite)."""

    work: dict[str, Any]
    replaces_all: bool = False


def read_settings(path: Path) -> Settings | None:
    """Of the output so far; None: there is none. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} cannot be read ({error}): start anew with --overwrite") from None


def write_settings(path: Path, settings: Settings) -> None:
    write_whole(path, msgspec.json.format(msgspec.json.encode(settings)) + b"\n")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, in words: "prompt: 'a' -> 'b'"."""
    return [f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}" for name in new if old.get(name) != new[name]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- files ----


def write_whole(path: Path, data: bytes) -> None:
    """The file appears with all of its contents, or not at all. What a run that is killed meanwhile leaves beside it, hidden, is
    written over by the next."""
    unfinished = unfinished_name(path)
    with unfinished.open("wb") as file:
        file.write(data)
        flush_to_disk(file)
    os.replace(unfinished, path)


def unfinished_name(path: Path) -> Path:
    """However long the name is."""
    return path.with_name(f".{blake3(os.fsencode(path.name)).hexdigest(8)}.unfinished")


def flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def set_aside(paths: Collection[Path]) -> None:
    """Rename those that exist, in this order, so that an output begins anew and nothing is lost."""
    existing = [path for path in paths if path.exists()]
    number = 1
    while any(_set_aside_name(path, number).exists() for path in existing):
        number += 1
    for path in existing:
        path.rename(_set_aside_name(path, number))


def _set_aside_name(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.previous-{number}")
