"""The command itself: help comes at once, errors are one sentence, and the exit status says whose fault it was."""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

import mmv1
from mmv1.cli import main as cli
from mmv1.errors import ConfigError, EngineDeadError, ImageError
from tests.cli.command import ROOT, assert_one_sentence
from tests.cli.command import mmv1 as run_mmv1

HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "numpy", "zmq", "tokenizers", "PIL", "httpx", "yaml", "tqdm", "pyarrow"}


def cpu_seconds(*arguments: str) -> float:
    """Processor time of one run of Python: what a person waits for on an idle machine, measurable on a busy one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [(), *((command,) for command in cli.COMMANDS), ("bench", "serve")], ids=" ".join)
def test_help_comes_at_once(arguments: tuple[str, ...]) -> None:
    assert min(cpu_seconds("-m", "mmv1", *arguments, "--help") for _ in range(2)) < 1.0  # 0.2 on an idle machine


@pytest.mark.parametrize("arguments", [(), *((command,) for command in cli.COMMANDS)], ids=" ".join)
def test_nothing_heavy_is_imported_for_help(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from mmv1.cli.main import make_parser\n"
        f"parser, asked = make_parser({list(arguments)!r}); (asked or parser).format_help(); print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert not HEAVY & set(modules.stdout.split())


def test_help_names_every_command_and_version_is_the_packages() -> None:
    shown = run_mmv1("--help").stdout
    for command in cli.COMMANDS:
        assert f"    {command} " in shown
    assert run_mmv1("--version").stdout.strip() == f"mmv1 {mmv1.__version__}"


def test_serve_help_shows_headings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for heading in ("Server:", "Model:", "Scheduler:", "Memory:", "Pictures:"):
        assert heading in text
    assert "(default: 256)" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["no command is given", "mmv1 --help"]),
        (("sevre",), ["there is no command 'sevre'", "did you mean serve?"]),
        (("serve", "--max-modellen", "4"), ["unknown argument --max-modellen", "did you mean --max-model-len?"]),
        (("serve", "a", "b"), ["unknown argument b"]),
        (("serve", "--dtype", "int4"), ["--dtype", "'int4'", "bfloat16", "mmv1 serve --help"]),
        (("serve", "--limit-mm-per-prompt", "4"), ["--limit-mm-per-prompt", "is not a JSON object"]),
        (("serve", "--config", "missing.yaml"), ["missing.yaml cannot be read"]),
    ],
)
def test_wrong_words_are_one_sentence(arguments: tuple[str, ...], words: list[str]) -> None:
    assert_one_sentence(run_mmv1(*arguments), *words)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command `made-up` that does what the test puts in `outcome`: an exit status or an exception."""
    made_up = SimpleNamespace(outcome=0)

    def run(_: argparse.Namespace) -> int:
        if isinstance(made_up.outcome, BaseException):
            raise made_up.outcome
        return made_up.outcome

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: module if name == "made.up" else real(name))
    monkeypatch.setitem(cli.COMMANDS, "made-up", cli.Command("made.up", "made up", ""))
    return made_up


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (ConfigError("the settings"), 2, "mmv1: the settings\n"),
        (ImageError("the picture"), 2, "mmv1: the picture\n"),
        (EngineDeadError("the engine"), 1, "mmv1: the engine\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_exit_status(
    command: SimpleNamespace, outcome: object, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command.outcome = outcome
    assert cli.main(["made-up"]) == status
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_keeps_its_traceback(command: SimpleNamespace) -> None:
    command.outcome = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["made-up"])


@pytest.mark.parametrize("size", [10, 100_000])  # what waits in the buffer until the end, and what does not
def test_a_reader_that_goes_away_is_no_error(size: int) -> None:
    """As `mmv1 ... | head` does; Python's own way is a traceback at the end."""
    code = (
        "import sys, types; from mmv1.cli import main as cli\n"
        f"def run(_):\n    print('x' * {size})\n    return 0\n"
        "sys.modules['made_up'] = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)\n"
        "cli.COMMANDS['made-up'] = cli.Command('made_up', 'made up', '')\n"
        "sys.exit(cli.main(['made-up']))"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=buffered, stdout=pipe, stderr=pipe)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
