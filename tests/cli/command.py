"""The command line as a shell runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def mmv1(*arguments: str | Path, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`mmv1 ARGUMENTS`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "mmv1", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str, status: int = 2) -> None:
    """It said what is wrong in one line, and nothing else."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("mmv1")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
