"""An append-only file of JSON lines that survives being killed at any moment.

Lines are written and fsynced in groups, by a thread, a twentieth of a second after the first of a group came ("group commit",
as databases do with their logs). So a kill loses that much at most, and can tear only the end of the file: a torn last line
is cut off at the next start. Only one process at a time may have it open.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mmv1.errors import ConfigError

_GROUP_S = 0.04


class Journal:
    """`append` returns at once and is for one thread or many; `flush` and `close` wait for the disk."""

    def __init__(self, path: Path, on_line: Callable[[bytes], object], *, begins: bytes = b"{") -> None:
        """Opens or creates the file, and hands every line that it holds to `on_line`, which raises ValueError or
        msgspec.DecodeError for one that is damaged. `begins`: how every line does; it tells a torn line from a stranger's file.

        Raises ConfigError: the file cannot be opened, another process has it, or there is something else in it.
        """
        self._path = path
        self._fd = _open(path)
        try:
            self._read(on_line, begins)
        except BaseException:
            os.close(self._fd)
            raise
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._lines: list[bytes] = []  # not yet written
        self._num_appended = self._num_on_disk = 0
        self._is_closing = False
        self._error: OSError | None = None
        self._writer = threading.Thread(target=self._write_groups, name="mmv1-journal", daemon=True)
        self._writer.start()

    def append(self, record: Any) -> None:
        """Write `record` as JSON in the next group. Raises ConfigError when an earlier one could not be written."""
        line = msgspec.json.encode(record) + b"\n"
        with self._changed:
            self._raise_if_failed()
            self._lines.append(line)
            self._num_appended += 1
            if len(self._lines) == 1:
                self._changed.notify_all()

    def flush(self) -> None:
        """Returns when all that was appended is on disk. Raises ConfigError when that cannot be."""
        with self._changed:
            target = self._num_appended
            if self._num_on_disk < target:
                self._hurry.set()
            self._changed.wait_for(lambda: self._num_on_disk >= target or self._error is not None)
            self._raise_if_failed()

    def close(self) -> None:
        """`flush`, and let others have the file."""
        if self._is_closing:
            return
        try:
            self.flush()
        finally:
            with self._changed:
                self._is_closing = True
                self._changed.notify_all()
            self._writer.join()
            os.close(self._fd)

    def _read(self, on_line: Callable[[bytes], object], begins: bytes) -> None:
        end = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{self._path}, line {number}"
                if not (line.startswith(begins) or begins.startswith(line)):
                    raise ConfigError(f"{place}, was not written by this command: give another output, or remove the line")
                if not line.endswith(b"\n"):
                    os.ftruncate(self._fd, end)
                    os.fsync(self._fd)
                    return
                try:
                    on_line(line)
                except (ValueError, msgspec.DecodeError) as error:
                    raise ConfigError(f"{place}, is damaged ({error}): remove the line, and it will be made again") from error
                end += len(line)

    def _write_groups(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closing)
                if not self._lines:
                    return
            self._hurry.wait(_GROUP_S)
            with self._changed:
                self._hurry.clear()
                lines, self._lines = self._lines, []
            try:
                _write(self._fd, b"".join(lines))
                os.fdatasync(self._fd)
            except OSError as error:
                self._error = error
            with self._changed:
                self._num_on_disk += 0 if self._error else len(lines)
                self._changed.notify_all()
                if self._error:
                    return

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            message = f"{self._path} cannot be written ({self._error.strerror}): what it holds is kept, run again to go on"
            raise ConfigError(message) from self._error


def _open(path: Path) -> int:
    """A descriptor of the file, which is locked. Raises ConfigError."""
    is_new = not path.exists()
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened for writing ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"{path} is no regular file: it must be one that can be read again after an interruption")
        _lock(fd, path)
        if is_new:
            _fsync_folder(path.parent)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{path} is being written by another run: wait for it, or give another output") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be locked ({error.strerror}): give an output on another file system") from error
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(fd)):  # renamed since it was opened, and the name is free
        raise ConfigError(f"{path} was just renamed by another run: wait for it, or give another output")


def _fsync_folder(folder: Path) -> None:
    """After this a file that was made in it is there after a power cut, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
