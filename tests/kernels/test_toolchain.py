"""What a machine lacks to compile kernels is named."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmv1.kernels import toolchain


@pytest.fixture(autouse=True)
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has everything; its directory of programs."""
    programs, headers = tmp_path / "bin", tmp_path / "include"
    for place in (programs, headers):
        place.mkdir()
    (headers / "Python.h").touch()
    add_program(programs / "gcc")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache" / "triton"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(headers))
    return programs


def add_program(path: Path) -> None:
    path.touch(mode=0o755)


def test_nothing_is_missing() -> None:
    assert toolchain.missing() == []


def test_any_compiler_that_triton_finds_will_do(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole / "gcc").unlink()
    (lack,) = toolchain.missing()
    assert "gcc or clang" in lack
    add_program(whole / "clang")
    assert toolchain.missing() == []
    monkeypatch.setenv("CC", str(whole / "mycc"))  # which Triton takes at its word
    (lack,) = toolchain.missing()
    assert "mycc" in lack
    add_program(whole / "mycc")
    assert toolchain.missing() == []


def test_headers_of_python(tmp_path: Path) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    (lack,) = toolchain.missing()
    assert "python3-dev" in lack


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    (lack,) = toolchain.missing()
    assert f"TRITON_CACHE_DIR, now {tmp_path}/file/triton" in lack


def test_a_directory_from_which_nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOSUID | os.ST_NOEXEC))
    (lack,) = toolchain.missing()
    assert "TRITON_CACHE_DIR" in lack
