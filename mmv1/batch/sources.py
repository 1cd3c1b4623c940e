"""Where the pictures to caption come from, as samples with a stable key: folders, globs, lists of files, JSONL, parquet,
webdataset shards. What a name is, is seen from the name itself.

Everything is lazy: a sample is a path or a URL until it is its turn, a row's or a shard's bytes are read when they are come to.
A row that cannot be used is a sample too, whose picture is an ImageError; so one bad row never ends a run.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

from blake3 import blake3

from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.media import ImageLimits

# Those that no decoder here accepts are listed too: they end in errors.jsonl with the reason, and are not passed over in silence.
PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl")
)
_URL_SCHEMES = ("http://", "https://", "data:")
_LIST_SUFFIXES = (".txt", ".lst", ".list")
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_PARQUET_ROWS = 64  # of one batch: they are in memory together
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")

Picture = Path | bytes | str | ImageError  # a file, an encoded picture, a URL, or why there is none


class Sample(NamedTuple):
    """One picture to caption. `key` names it, the same in every run."""

    key: str
    picture: Picture


class Columns(NamedTuple):
    """Which columns of JSONL and parquet are read; `key` None: a path or URL is its own key, else the file and the row are. In
    webdataset shards `image` is a sample's extension; None: the first that is a picture's."""

    image: str | None = None
    key: str | None = None


def shard_of(key: str, num_shards: int) -> int:
    """The shard that a sample falls in, 0 to num_shards - 1, whatever else is there. cat.jpg and cat.png fall in the same one,
    for their captions may be one file."""
    return int.from_bytes(blake3(os.path.splitext(key)[0].encode()).digest(8), "big") % num_shards


def samples(sources: Sequence[str], columns: Columns, limits: ImageLimits) -> Iterator[Sample]:
    """All samples of all sources, one after the other, in an order that stays the same. Of several files and folders each one's
    samples have its path in their keys; of one they have not, so that it may lie anywhere. Raises ConfigError when a source does
    not exist or cannot be what it is named as."""
    try:
        for source in sources:
            _check_exists(source)
        for source in sources:
            yield from _samples_of(source, columns, limits, prefix="" if len(sources) == 1 else os.path.normpath(source))
    except OSError as error:
        raise ConfigError(f"'{error.filename}' cannot be read ({error.strerror})") from error


def _check_exists(source: str) -> None:
    """What a later source lacks is said before the first one is begun. Raises ConfigError."""
    if source != "-" and not source.startswith(_URL_SCHEMES) and not Path(source).exists():
        for name in expand_braces(source):
            if not glob.has_magic(name) and not Path(name).exists():
                raise ConfigError(f"there is no file or folder '{name}'")


def count(sources: Sequence[str], columns: Columns) -> int | None:
    """How many samples there are; None when only reading all would tell (shards, standard input, a failing source)."""
    total = 0
    for source in (name for pattern in sources for name in expand_braces(pattern)):
        lower = source.lower()
        if source == "-" or lower.endswith(_SHARD_SUFFIXES):
            return None
        try:
            if lower.endswith(".parquet"):
                total += _pyarrow_parquet().ParquetFile(source).metadata.num_rows
            else:
                total += sum(1 for _ in _samples_of(source, columns, _NO_LIMITS, prefix=""))
        except (ConfigError, OSError, ValueError):
            return None  # the run itself will say what is wrong
    return total


_NO_LIMITS = ImageLimits(max_encoded_bytes=sys.maxsize, max_pixels=sys.maxsize, max_side=sys.maxsize)


def expand_braces(pattern: str) -> list[str]:
    """`{00000..00099}` (as many digits as the first has) and `{a,b}`, all combinations, as a shell would write them."""
    pieces: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        pieces.append([pattern[end : match.start()]])
        first, last, listed = match.groups()
        if listed is not None:
            pieces.append(listed.split(","))
        else:
            pieces.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        end = match.end()
    return ["".join(parts) for parts in product(*pieces, [pattern[end:]])]


def _samples_of(source: str, columns: Columns, limits: ImageLimits, *, prefix: str) -> Iterator[Sample]:
    if source == "-":
        with open(sys.stdin.fileno(), encoding="utf-8-sig", errors="surrogateescape", closefd=False) as lines:
            yield from _file_list(lines, Path(), "")
    elif source.startswith(_URL_SCHEMES):
        yield Sample(source, source)
    elif Path(source).exists():
        yield from _existing(Path(source), columns, limits, prefix)
    elif (names := expand_braces(source)) != [source]:
        for name in names:
            yield from _samples_of(name, columns, limits, prefix=name)
    else:
        yield from _glob(source, columns, limits)


def _existing(path: Path, columns: Columns, limits: ImageLimits, prefix: str) -> Iterator[Sample]:
    name, folder = path.name.lower(), os.path.dirname(prefix)
    if path.is_dir():
        yield from _folder(path, prefix)
    elif path.suffix.lower() in PICTURE_SUFFIXES:
        yield Sample(_key_of(path), path)
    elif name.endswith(_SHARD_SUFFIXES):
        yield from _shard(path, columns, limits, folder)
    elif name.endswith(_JSONL_SUFFIXES):
        yield from _jsonl(path, columns, folder)
    elif name.endswith(".parquet"):
        yield from _parquet(path, columns, folder)
    elif name.endswith(_LIST_SUFFIXES):
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            yield from _file_list(lines, path.parent, folder)
    else:
        kinds = "a folder, a picture, .txt (a list of files), .jsonl, .parquet or .tar"
        raise ConfigError(f"'{path}' is none of what pictures are read from: {kinds}")


def _glob(pattern: str, columns: Columns, limits: ImageLimits) -> Iterator[Sample]:
    """Pictures among what matches; or all that matches, where the pattern itself names a kind of file."""
    takes_all = pattern.lower().endswith((*_SHARD_SUFFIXES, *_JSONL_SUFFIXES, ".parquet"))
    found = False
    for name in sorted(glob.iglob(pattern, recursive=True)):
        if takes_all or Path(name).suffix.lower() in PICTURE_SUFFIXES:
            found = True
            yield from _existing(Path(name), columns, limits, os.path.normpath(name))
    if not found:
        raise ConfigError(f"no {'file' if takes_all else 'picture'} matches '{pattern}'")


def _folder(folder: Path, prefix: str) -> Iterator[Sample]:
    """Pictures below a folder; keys are paths relative to it. Hidden files and folders are passed over, links to folders not
    followed. Raises OSError when the folder itself cannot be read."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        key = os.path.join(prefix, entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            try:
                yield from _folder(Path(entry.path), key)
            except OSError as error:
                yield Sample(_key_of(key), ImageError(f"the folder cannot be read ({error.strerror})"))
        elif os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES:
            yield Sample(_key_of(key), Path(entry.path))


def _file_list(lines: TextIO, folder: Path, prefix: str) -> Iterator[Sample]:
    """A path or URL a line; paths are relative to where the list lies."""
    for line in lines:
        if name := line.rstrip("\r\n"):
            yield _named(name, folder, prefix)


def _named(name: str, folder: Path, prefix: str) -> Sample:
    """The picture that a path, relative to `folder`, or a URL names. `prefix`: the folder in keys."""
    if name.startswith("data:"):
        return Sample(f"data:{blake3(name.encode('utf-8', 'replace')).hexdigest(16)}", name)
    if name.startswith(_URL_SCHEMES):
        return Sample(_printable(name), name)
    key = _key_of(os.path.join(prefix, name))
    path = folder / name
    try:
        if path.name and b"\0" not in os.fsencode(path):
            return Sample(key, path)
    except UnicodeEncodeError:
        pass
    return Sample(key, ImageError("this can be no file's name"))


def _key_of(path: str | Path) -> str:
    return _printable(os.path.normpath(path))


def _printable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8, and halves of characters in JSON, become backslashes and digits."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


# ---- rows ----


def _jsonl(path: Path, columns: Columns, prefix: str) -> Iterator[Sample]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row_name = _key_of(os.path.join(prefix, f"{path.name}:{number}"))
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield _row_sample(row, row_name, path.parent, columns, prefix)
            else:
                yield Sample(row_name, ImageError(f"line {number} is not a JSON object"))


def _parquet(path: Path, columns: Columns, prefix: str) -> Iterator[Sample]:
    number, parquet = 0, _pyarrow_parquet()
    try:
        table = parquet.ParquetFile(path)
        _check_columns(table.schema_arrow.names, path, columns)
        wanted = [columns.image or "image", *([columns.key] if columns.key is not None else [])]
        for batch in table.iter_batches(batch_size=_MAX_PARQUET_ROWS, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                row_name = _key_of(os.path.join(prefix, f"{path.name}:{number}"))
                yield _row_sample(row, row_name, path.parent, columns, prefix)
    except (OSError, ValueError) as error:  # ArrowInvalid is one
        fault = f"the file cannot be read after {number} rows ({type(error).__name__}: {' '.join(str(error).split())})"
        yield Sample(_key_of(os.path.join(prefix, path.name)), ImageError(fault))


def _check_columns(known: Sequence[str], path: Path, columns: Columns) -> None:
    """Raises ConfigError."""
    for name, flag in ((columns.image or "image", "--image-column"), (columns.key, "--key-column")):
        if name is not None and name not in known:
            raise ConfigError(f"'{path}' has no column '{name}': name one of {', '.join(known)} with {flag}")


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("parquet files need pyarrow: install it with `pip install 'mmv1[parquet]'`") from None
    return pyarrow.parquet


def _row_sample(row: dict[str, Any], row_name: str, folder: Path, columns: Columns, prefix: str) -> Sample:
    name = columns.image or "image"
    value = row.get(name)
    if isinstance(value, dict):  # as the datasets library stores pictures: the bytes, or where they are
        value = value.get("bytes") or value.get("path") or value.get("url")
    key: Any = row_name
    picture: Picture
    if isinstance(value, bytes):
        picture = value
    elif isinstance(value, str) and value:
        key, picture = _named(value, folder, prefix)
    else:
        picture = ImageError(f"the row has no picture in '{name}': name the column with --image-column")
    if columns.key is not None:
        key = row.get(columns.key)
        if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
            return Sample(row_name, ImageError(f"the row has no text or number in '{columns.key}' (--key-column)"))
    return Sample(_printable(str(key)), picture)


# ---- webdataset ----


def _shard(path: Path, columns: Columns, limits: ImageLimits, prefix: str) -> Iterator[Sample]:
    """A tar file in which neighbours of one name, up to its first dot, are one sample. Read from beginning to end, once."""
    shard = os.path.join(prefix, path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz"))
    name, picture, num_samples = None, None, 0
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                member_name, extension = _split_member(member.name)
                if not member.isfile() or not extension or member_name.rpartition("/")[2].startswith("__"):
                    continue
                if name is not None and member_name != name:
                    yield Sample(_key_of(f"{shard}/{name}"), picture or _NO_PICTURE)
                    picture, num_samples = None, num_samples + 1
                name = member_name
                if picture is None and _is_wanted(extension, columns.image):
                    picture = _member_bytes(archive, member, limits)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        # What was being read when it broke is lost with the rest.
        fault = f"the shard cannot be read after {num_samples} samples ({type(error).__name__}: {error})"
        yield Sample(_key_of(os.path.join(prefix, path.name)), ImageError(fault))
        return
    if name is not None:
        yield Sample(_key_of(f"{shard}/{name}"), picture or _NO_PICTURE)


_NO_PICTURE = ImageError("the sample has no picture")


def _split_member(member: str) -> tuple[str, str]:
    """Name and extension as webdataset has them: parted at the first dot after the last slash."""
    path = PurePosixPath(member)
    stem, _, extension = path.name.partition(".")
    return (path.parent / stem).as_posix(), extension.lower()


def _is_wanted(extension: str, image: str | None) -> bool:
    return extension == image.lower().removeprefix(".") if image is not None else f".{extension}" in PICTURE_SUFFIXES


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo, limits: ImageLimits) -> bytes | ImageError:
    try:
        limits.check_encoded(member.size)
    except ImageError as error:
        return error
    file = archive.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise EOFError("unexpected end of data")
    return data


