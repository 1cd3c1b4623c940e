"""What Triton needs of a machine beside the device.

It compiles kernels when they are first used, and for each of them builds a small extension of Python in C, with whatever compiler
there is. Both are kept in a directory and loaded from there.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from triton import knobs


def missing() -> list[str]:
    """What is not here, in words; Triton itself finds out in the middle of the first kernel."""
    lacks = []
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        lacks.append(f"a C compiler ({' or '.join(compilers)}; Debian: gcc and libc6-dev)")
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        lacks.append("Python's headers (Debian: python3-dev)")
    if not _holds_programs(knobs.cache.dir):
        lacks.append(f"a directory that can be written to and executed from (TRITON_CACHE_DIR, now {knobs.cache.dir})")
    return lacks


def _holds_programs(directory: str) -> bool:
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK) and not os.statvfs(directory).f_flag & os.ST_NOEXEC
