"""What the machine has to give to this process."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory_bytes() -> int:
    """Memory this process may still take: what the machine has left, or its control group where that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    limit, used = (_read(f"/sys/fs/cgroup/{name}").strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():  # "max": no limit
        available = min(available, int(limit) - int(used))
    return max(0, available)


def _read(path: str) -> str:
    """Empty where there is no such file: another system, or no control groups."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
