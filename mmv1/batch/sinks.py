"""Where captions go: text files beside the pictures, JSONL, parquet, webdataset shards.

A sink says in its own terms which samples are done (a file that exists, a shard that is finished). What a killed run had not
got to is made again from the log, without the model. Files appear whole, by renaming. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import tarfile
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from mmv1.batch.caption_log import CaptionLog, Row, flush_to_disk, unfinished_name, write_whole
from mmv1.batch.sources import PICTURE_SUFFIXES, Sample
from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.header import probe_header

_PARQUET_ROWS = 4096  # of one row group
_EXTENSIONS = {"JPEG": "jpg"}  # of picture formats that are not called like it
_json = msgspec.json.Encoder()


class Sink(Protocol):
    """`is_done` may be called on another thread than the others."""

    def place_of(self, sample: Sample) -> str:
        """Where its caption goes, among all of this sink. Raises ConfigError for a sample that has no such place."""

    def is_done(self, sample: Sample) -> bool:
        """Whether the sample's caption is where it belongs, from this run or an earlier one."""

    def make_room(self, sample: Sample) -> None:
        """Called before the log has the row: an older caption of the sample must not pass for the new one. Raises OSError."""

    def write(self, sample: Sample, row: Row, picture: bytes) -> None:
        """The log has the row. Raises OSError."""

    def close(self) -> None:
        """Finish what is unfinished. Raises OSError."""


class Recorder:
    """Keeps rows: in the log first, then in the sink. Rows that come while others are being written are written together, in a
    thread. One event loop."""

    def __init__(self, log: CaptionLog, sink: Sink) -> None:
        self._log = log
        self._sink = sink
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None

    async def record(self, sample: Sample, row: Row, picture: bytes) -> None:
        """On disk when it returns. Raises ConfigError when that cannot be."""
        waiting = _Waiting(sample, row, picture, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        await waiting.written

    async def finish(self) -> None:
        """Returns when nothing is being written any more, also for those who no longer wait. Raises nothing."""
        if self._writing is not None:
            await self._writing

    async def _write_all(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            fault: BaseException | None = None
            try:
                await asyncio.to_thread(self._write, group)
            except OSError as error:
                name = error.filename or "the output"
                fault = ConfigError(f"{name} cannot be written ({error.strerror}): what is there is kept, run again to go on")
            except BaseException as error:  # whatever it is, whoever waits must hear of it
                fault = error
            for waiting in group:
                if waiting.written.done():  # cancelled
                    continue
                if fault is None:
                    waiting.written.set_result(None)
                else:
                    waiting.written.set_exception(fault)
        self._writing = None

    def _write(self, group: list[_Waiting]) -> None:
        for waiting in group:
            self._sink.make_room(waiting.sample)
        # A row can be there already: of a run that was killed before the sink had it.
        self._log.append([waiting.row for waiting in group if not self._log.has(waiting.row)])
        for waiting in group:
            self._sink.write(waiting.sample, waiting.row, waiting.picture)


class _Waiting(NamedTuple):
    sample: Sample
    row: Row
    picture: bytes
    written: asyncio.Future[None]


def caption_text(row: Row) -> str:
    """A caption that follows a schema is an object; where only text can be, it is JSON."""
    caption = row["caption"]
    return caption if isinstance(caption, str) else json.dumps(caption, ensure_ascii=False)


class SidecarSink:
    """A text file beside each picture: cat.jpg, cat.txt.

    A file that this tool did not write is somebody's caption, and is left alone unless `replaces_all`. `written_before`: keys
    whose files were written under other settings, and are to be replaced.
    """

    def __init__(self, log: CaptionLog, extension: str, *, written_before: Collection[str], replaces_all: bool) -> None:
        self._log = log
        self._extension = extension if extension.startswith(".") else f".{extension}"
        self._written_before = written_before
        self._replaces_all = replaces_all
        self.num_left_alone = 0

    def place_of(self, sample: Sample) -> str:
        return sample.key if isinstance(sample.picture, ImageError) else str(self._path_of(sample))

    def _path_of(self, sample: Sample) -> Path:
        if not isinstance(sample.picture, Path):
            raise ConfigError(f"'{sample.key}' is no file, so no text file can lie beside it: give --output")
        return sample.picture.with_suffix(self._extension)

    def is_done(self, sample: Sample) -> bool:
        if isinstance(sample.picture, ImageError) or not os.path.exists(self._path_of(sample)):
            return False
        if sample.key in self._log.keys:
            return True
        if self._replaces_all or sample.key in self._written_before:
            return False
        self.num_left_alone += 1
        return True

    def make_room(self, sample: Sample) -> None:
        self._path_of(sample).unlink(missing_ok=True)

    def write(self, sample: Sample, row: Row, picture: bytes) -> None:
        write_whole(self._path_of(sample), caption_text(row).encode() + b"\n")

    def close(self) -> None:
        pass


class JsonlSink:
    """The log itself is the output."""

    def __init__(self, log: CaptionLog) -> None:
        self._log = log

    def place_of(self, sample: Sample) -> str:
        return sample.key

    def is_done(self, sample: Sample) -> bool:
        return sample.key in self._log.keys

    def make_room(self, sample: Sample) -> None:
        pass

    def write(self, sample: Sample, row: Row, picture: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class ParquetSink(JsonlSink):
    """The log again, written as a table when the run ends."""

    def __init__(self, log: CaptionLog, path: Path) -> None:
        """Raises ConfigError without pyarrow."""
        super().__init__(log)
        self._path = path
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError("parquet files need pyarrow: install it with `pip install 'mmv1[parquet]'`") from None
        self._pyarrow = pyarrow

    def close(self) -> None:
        pyarrow, rows = self._pyarrow, self._log.rows()
        texts = pyarrow.list_(pyarrow.string())
        kinds = {
            "key": pyarrow.string(), "caption": pyarrow.string(), "blake3": pyarrow.string(), "clip_score": pyarrow.float64(),
            "captions": texts, "clip_scores": pyarrow.list_(pyarrow.float64()), "is_cut": pyarrow.bool_(),
        }  # fmt: skip
        schema = pyarrow.schema(list(kinds.items()))
        unfinished = unfinished_name(self._path)
        with unfinished.open("wb") as file:
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                while group := list(islice(rows, _PARQUET_ROWS)):
                    table = [{**row, "caption": caption_text(row)} for row in group]
                    writer.write_table(pyarrow.Table.from_pylist(table, schema=schema))
            flush_to_disk(file)
        os.replace(unfinished, self._path)


class ShardSink:
    """webdataset: tar files 00000.tar, 00001.tar, ..., each sample a picture, its caption (.txt) and its row (.json).

    Beside each shard lies its list, 00000.jsonl, which is there before the shard is: a shard without it is none of ours. A shard
    that a killed run had not finished is written again.
    """

    def __init__(self, folder: Path, prefix: str, samples_a_shard: int) -> None:
        """`prefix`: of the names of shards. Raises ConfigError when other tar files are in the way."""
        self._folder = folder
        self._prefix = prefix
        self._samples_a_shard = samples_a_shard
        self._keys: set[str] = set()
        self._number = 0  # of the next shard
        self._tar: tarfile.TarFile | None = None
        self._rows: list[Row] = []  # in the open shard
        for path in shard_paths(folder, prefix):
            self._number = max(self._number, int(path.stem.removeprefix(prefix)) + 1)
            try:
                lines = path.with_suffix(".jsonl").read_bytes().splitlines()
            except FileNotFoundError:
                raise ConfigError(f"{path} was not written by this tool: choose an empty folder for the shards") from None
            self._keys.update(msgspec.json.decode(line)["key"] for line in lines)

    def place_of(self, sample: Sample) -> str:
        return sample.key

    def is_done(self, sample: Sample) -> bool:
        return sample.key in self._keys

    def make_room(self, sample: Sample) -> None:
        pass

    def write(self, sample: Sample, row: Row, picture: bytes) -> None:
        if self._tar is None:
            self._tar = tarfile.TarFile(unfinished_name(self._path), "w", format=tarfile.PAX_FORMAT)
        name = f"{self._prefix}{self._number:05d}{len(self._rows):05d}"
        try:
            self._add(f"{name}.{_extension_of(sample, picture)}", picture)
            self._add(f"{name}.txt", caption_text(row).encode())
            self._add(f"{name}.json", _json.encode(row))
        except BaseException:
            self._forsake()
            raise
        self._rows.append(row)
        self._keys.add(sample.key)
        if len(self._rows) == self._samples_a_shard:
            self.close()

    def close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        unfinished = unfinished_name(self._path)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        write_whole(self._path.with_suffix(".jsonl"), b"".join(_json.encode(row) + b"\n" for row in self._rows))
        os.replace(unfinished, self._path)
        self._tar, self._rows, self._number = None, [], self._number + 1

    def _forsake(self) -> None:
        """A member may be torn, so the shard must never be seen under its name. The log has its rows for the next run."""
        assert self._tar is not None and self._tar.fileobj is not None
        with contextlib.suppress(OSError):
            self._tar.fileobj.close()
        self._tar, self._rows = None, []

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._prefix}{self._number:05d}.tar"

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def _extension_of(sample: Sample, picture: bytes) -> str:
    """Of the picture's format; of its name where only the server knows the format."""
    try:
        image_format = probe_header(picture, ("BMP", "TIFF")).format
    except ImageError:
        suffix = Path(sample.key).suffix.lower()
        return suffix[1:] if suffix in PICTURE_SUFFIXES else "img"
    return _EXTENSIONS.get(image_format, image_format.lower())


def shard_paths(folder: Path, prefix: str) -> Iterator[Path]:
    """Finished shards, in order."""
    for path in sorted(folder.glob(f"{prefix}*.tar")):
        if path.stem.removeprefix(prefix).isdecimal():
            yield path
