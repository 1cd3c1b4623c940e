"""Pictures in local files: any that the program itself names, and of those that a request names, with a `file:` URL, the ones
below the directory that the operator allowed (vLLM's --allowed-local-media-path). Nothing else opens a picture's file.

A path is resolved first, links and `..` included, and then followed part by part without any link. So a link that leads out is
refused, also one that appears after the check; and only regular files are opened: no device, no pipe.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmv1.errors import ImageError
from mmv1.preprocess.media import ImageLimits

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_file(path: Path, limits: ImageLimits) -> bytes:
    """For offline use. Raises ImageError: image_fetch_failed, image_too_large."""
    real = Path(os.path.realpath(path))
    return _read_below(Path(real.anchor), real, limits)


def read_file_url(url: str, root: Path | None, limits: ImageLimits) -> bytes:
    """What `file:///path` names, if that really lies below `root`, a resolved directory. None: there are no files to read.
    Raises ImageError: those of `read_file`, and image_url_forbidden."""
    if root is None:
        raise ImageError("file: URLs are not allowed here", code="image_url_forbidden")
    path = Path(os.path.realpath(_path_of(url)))
    if root not in path.parents:
        raise ImageError("file: URLs may not name files of this directory", code="image_url_forbidden")
    return _read_below(root, path, limits)


def _path_of(url: str) -> str:
    """Nothing but an absolute path may be in the URL: no other host, no query, no fragment."""
    try:
        parts = urlsplit(url)
        path = unquote(parts.path, errors="strict")
        host = parts.netloc.lower()
    except ValueError:
        host = path = ""
    if not url.isprintable() or host not in ("", "localhost") or "?" in url or "#" in url or path[:1] != "/" or "\0" in path:
        message = "a file: URL must have the form file:///path, with a percent sign for every character that paths may not have"
        raise ImageError(message, code="image_url_forbidden")
    return path


def _read_below(root: Path, path: Path, limits: ImageLimits) -> bytes:
    try:
        with open(_open_below(root, path), "rb") as file:
            limits.check_encoded(os.fstat(file.fileno()).st_size)
            data = file.read(limits.max_encoded_bytes + 1)  # it may have grown
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else "no name that a file can have"
        message = f"the image file {path.name!r} cannot be read ({reason})"
        raise ImageError(message, code="image_fetch_failed") from None
    limits.check_encoded(len(data))
    return data


def _open_below(root: Path, path: Path) -> int:
    """A descriptor of the regular file at `path`, a resolved path below `root`. Raises OSError."""
    *folders, name = path.relative_to(root).parts or (".",)
    folder = os.open(root, _FOLDER)
    try:
        for part in folders:
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        _check_regular(os.stat(name, dir_fd=folder, follow_symlinks=False))
        file = os.open(name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        _check_regular(os.fstat(file))  # by now another may have taken its place
    except OSError:
        os.close(file)
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
