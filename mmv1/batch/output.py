"""One output as a whole: its log, settings, errors and sink, opened so that the run goes on where an earlier one stopped.

When captions would depend on something else than before (the prompt, the model, ...), what there is is set aside under another
name, and the output starts anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from mmv1.batch.caption_log import (
    CaptionLog,
    Errors,
    Files,
    Settings,
    changes,
    keys_set_aside,
    read_settings,
    set_aside,
    write_settings,
)
from mmv1.batch.sinks import JsonlSink, ParquetSink, ShardSink, SidecarSink, Sink, shard_paths
from mmv1.batch.sources import Sample, shard_of
from mmv1.errors import ConfigError, ImageError
from mmv1.log import logger

_WEBDATASET = "wds:"


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` shares of the work."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """In the names of files; nothing when the work is not shared."""
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""


@dataclass(frozen=True, kw_only=True)
class OutputArgs:
    """The user's words. `place` None: text files beside the pictures, and the log in the one folder they are in, or here."""

    place: str | None
    sources: Sequence[str]
    shard: Shard
    extension: str
    samples_a_shard: int
    overwrite: bool


class Output:
    """Locked from now on until `close`; written to from `begin` on. Raises ConfigError where it cannot be opened."""

    def __init__(self, args: OutputArgs, work: dict[str, Any]) -> None:
        """`work`: all that a caption depends on."""
        self._args, self._work = args, work
        with _writing(), ExitStack() as opened:
            self.files = _files(args)
            self.log = CaptionLog(self.files.log)
            opened.callback(self._close_log)
            self._old = None if args.overwrite else read_settings(self.files.settings)
            self._opened = opened.pop_all()
        self._reason = self._reason_to_begin_anew()

    @property
    def sets_aside(self) -> bool:
        """Whether `begin` renames captions that there are."""
        return bool(self._reason and self.log.keys)

    def begin(self) -> None:
        """With what there is, or anew. Once. Raises ConfigError."""
        with _writing():
            self._go_on_or_begin()
            self.sink = self._make_sink()
            self.errors = Errors(self.files.errors)
            self._opened.callback(self.errors.close)
            self._opened.callback(self.sink.close)

    def close(self) -> None:
        """Finish what is unfinished. Raises ConfigError when the rest cannot be written."""
        try:
            self._opened.close()
        except OSError as error:
            raise ConfigError(f"the output cannot be finished ({error.strerror}): run again to go on") from error

    def _close_log(self) -> None:
        """The one that it is by then."""
        self.log.close()

    def _reason_to_begin_anew(self) -> str:
        """In words; "" for none."""
        if self._args.overwrite:
            return "--overwrite"
        if self._old is None:
            return "its settings are gone" if self.log.keys else ""
        return "; ".join(changes(self._old.work, self._work))

    def _go_on_or_begin(self) -> None:
        """With the log that there is, or another."""
        args, files, log, old, reason = self._args, self.files, self.log, self._old, self._reason
        if reason:
            if log.keys:
                logger.warning("Every picture is captioned anew (%s); %d captions are set aside as %s.previous-*",
                               reason, len(log.keys), files.log)  # fmt: skip
            set_aside([*self._made_of_log(), *([files.log] if log.keys else [])])
            if log.keys:
                self.log = CaptionLog(files.log)
                log.close()
        elif log.keys:
            logger.info("Going on: %d captions are there", len(log.keys))
        self._replaces_all = args.overwrite or (old is not None and not reason and old.replaces_all)
        write_settings(files.settings, Settings(self._work, self._replaces_all))

    def end_overwriting(self) -> None:
        """All is done that --overwrite was said for: text files that come to be later are left alone. Raises ConfigError."""
        if not self._replaces_all:
            return
        try:
            write_settings(self.files.settings, Settings(self._work))
        except OSError as error:
            raise ConfigError(f"{self.files.settings} cannot be written ({error.strerror})") from error

    def _made_of_log(self) -> Iterator[Path]:
        """What must not outlive the log."""
        place = self._args.place or ""
        if place.startswith(_WEBDATASET):
            for path in shard_paths(self.files.log.parent, self._shard_prefix):
                yield path
                yield path.with_suffix(".jsonl")
        elif place.endswith(".parquet"):
            yield _part(Path(place), self._args.shard)

    def _make_sink(self) -> Sink:
        args, log = self._args, self.log
        place = args.place or ""
        if not place:
            before = keys_set_aside(self.files.log)
            return SidecarSink(log, args.extension, written_before=before, replaces_all=self._replaces_all)
        if place.startswith(_WEBDATASET):
            return ShardSink(self.files.log.parent, self._shard_prefix, args.samples_a_shard)
        return ParquetSink(log, _part(Path(place), args.shard)) if place.endswith(".parquet") else JsonlSink(log)

    @property
    def _shard_prefix(self) -> str:
        return f"{self._args.shard.name}-" if self._args.shard.name else ""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written ({error.strerror})") from error


def _files(args: OutputArgs) -> Files:
    """Makes the folder. Raises ConfigError, OSError."""
    place = args.place
    if place is None:
        only = args.sources[0] if len(args.sources) == 1 else "."
        return Files.beside(Path(only if os.path.isdir(only) else "."), args.shard.name)
    if place.startswith(_WEBDATASET):
        folder = Path(place.removeprefix(_WEBDATASET))
        folder.mkdir(parents=True, exist_ok=True)
        return Files.beside(folder, args.shard.name)
    if not place.endswith((".jsonl", ".parquet")):
        raise ConfigError(f"--output {place} must end with .jsonl or .parquet, or begin with wds: for webdataset shards")
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = Files.beside(path, args.shard.name)
    if place.endswith(".parquet") and _part(path, args.shard).exists() and not files.settings.exists() and not args.overwrite:
        raise ConfigError(f"{place} exists and was not written by this command: give another --output, or --overwrite")
    return files


def _part(path: Path, shard: Shard) -> Path:
    return path.with_name(f"{path.stem}.{shard.name}{path.suffix}") if shard.name else path


class Selection:
    """Of all samples those to caption now: of this shard, among its first `limit`, and not done. Iterated once, in one thread."""

    def __init__(self, samples: Iterable[Sample], sink: Sink, shard: Shard, limit: int | None) -> None:
        self._samples = samples
        self._sink = sink
        self._shard = shard
        self._limit = limit
        self._sources_by_place: dict[bytes, bytes] = {}  # digests, of 8 bytes: names would take ten times the memory
        self.num_found = self.num_done = 0  # of all shards; of this one

    def __iter__(self) -> Iterator[Sample]:
        for sample in islice(self._unrepeated(self._mine()), self._limit):
            if self._sink.is_done(sample):
                self.num_done += 1
            else:
                yield sample

    def _mine(self) -> Iterator[Sample]:
        for sample in self._samples:
            self.num_found += 1
            if shard_of(sample.key, self._shard.count) == self._shard.index:
                yield sample

    def _unrepeated(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """A sample that is listed twice comes once; of two samples whose captions would be in one place the second is a fault."""
        for sample in samples:
            place = self._sink.place_of(sample)
            source = _short_digest(sample.key.encode() + b"\0" + _source_of(sample))
            if (first := self._sources_by_place.setdefault(_short_digest(place.encode("utf-8", "replace")), source)) is source:
                yield sample  # the object itself: nobody was there
            elif first != source:
                fault = "another picture has the same key: name another column with --key-column"
                if place != sample.key:
                    fault = "its caption would be in the same file as another picture's: give --output"
                yield Sample(sample.key, ImageError(fault))


def _source_of(sample: Sample) -> bytes:
    """What tells apart two samples of one key."""
    picture = sample.picture
    if isinstance(picture, bytes):
        return picture
    return os.fsencode(os.path.normpath(picture)) if isinstance(picture, Path) else str(picture).encode("utf-8", "replace")


def _short_digest(data: bytes) -> bytes:
    return blake3(data).digest(8)
