"""What the machine says it has."""

from __future__ import annotations

import os

import pytest

import mmv1.host as host


def test_available_memory_is_plausible() -> None:
    assert 64 << 20 < host.available_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


PLENTY, LIMIT, USED = "/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({PLENTY: "MemTotal: 9 kB\nMemAvailable:   5 kB\n"}, 5 << 10),
        ({PLENTY: "MemAvailable: 5 kB", LIMIT: "max\n", USED: "7\n"}, 5 << 10),
        ({PLENTY: "MemAvailable: 5 kB", LIMIT: "3000\n", USED: "1000"}, 2000),
        ({PLENTY: "MemAvailable: 5 kB", LIMIT: "10", USED: "20"}, 0),
        ({}, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    ],
)
def test_the_machine_or_its_container(files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_read", lambda path: files.get(path, ""))
    assert host.available_memory_bytes() == expected
