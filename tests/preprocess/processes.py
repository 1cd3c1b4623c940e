"""Looking at processes, for tests of the pool."""

import os
import time
from pathlib import Path


def children(pid):
    """Pids of the living children of `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.01)


def cpu_seconds(pid):
    """User and system time of all its threads."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def private_bytes(pid):
    """Memory that only this process has: neither shared with the process it was forked from, nor of a shared mapping."""
    total, is_shared_mapping = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_shared_mapping = values[0].endswith("s")
        elif key in ("Private_Clean:", "Private_Dirty:") and not is_shared_mapping:
            total += int(values[0]) << 10
    return total


def file_descriptors():
    return len(os.listdir("/proc/self/fd"))
