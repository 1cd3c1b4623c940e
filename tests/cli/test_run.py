"""`mmv1 run`: which word is what, and one answer from the demo model on stdout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo_model.evaluate import MODEL_DIR
from mmv1.cli import run
from mmv1.errors import ConfigError
from tests.cli.command import ROOT, assert_one_sentence, mmv1
from tests.integration.server import children_of, process_exists, wait_until

PICTURES = ROOT / "examples" / "pictures"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model, a directory that is none, and two pictures."""
    for name in ("model/config.json", "describe/notes.txt", "cat.jpg", "pets/dog.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "model", "expected"),
    [
        (["What?"], "", ("", "What?", [])),
        (["What?", "cat.jpg"], "", ("", "What?", [Path("cat.jpg")])),
        (["model", "What?", "cat.jpg", "pets/dog.jpg"], "", ("model", "What?", [Path("cat.jpg"), Path("pets/dog.jpg")])),
        (["./model", "What?"], "", ("./model", "What?", [])),
        (["Qwen/Qwen2.5-VL-3B-Instruct", "What?"], "", ("Qwen/Qwen2.5-VL-3B-Instruct", "What?", [])),
        (["describe", "pets/dog.jpg"], "", ("", "describe", [Path("pets/dog.jpg")])),  # a directory without a model
        (["cats or/and dogs?", "cat.jpg"], "", ("", "cats or/and dogs?", [Path("cat.jpg")])),
        (["black/white", "cat.jpg"], "x/y", ("x/y", "black/white", [Path("cat.jpg")])),  # --model settles it
        (["model", "cat.jpg"], "x/y", ("x/y", "model", [Path("cat.jpg")])),
        (["What?", "https://a.org/cat.jpg", "data:,x"], "", ("", "What?", ["https://a.org/cat.jpg", "data:,x"])),
        (["Why? " * 60, "cat.jpg"], "", ("", "Why? " * 60, [Path("cat.jpg")])),  # longer than a file's name can be
    ],
)
def test_which_word_is_what(words: list[str], model: str, expected: object, folder: Path) -> None:
    assert tuple(run._question_of(words, model)) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["What", "is", "this?"], "no picture file 'is' .a question of several words needs quotes"),
        (["What?", "missing.jpg"], "no picture file 'missing.jpg'"),
        (["What?", "pets"], "no picture file 'pets'"),
        (["What?", "is this? " * 40], "a question of several words needs quotes"),
        (["cat.jpg"], "'cat.jpg' is a file: say before it what to ask"),
        (["cat.jpg", "What?"], "'cat.jpg' is a file: say before it what to ask"),
        (["model"], "'model' is a model: say after it what to ask"),
        ([""], "the question is empty"),
    ],
)
def test_words_that_cannot_be(words: list[str], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run._question_of(words, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["What?", "missing.jpg"], ["no picture file 'missing.jpg'"]),
        (["What?", "--max-tokens", "0"], ["max_tokens"]),
        (["What?", "--temperature", "-1"], ["temperature"]),
        (["What?", "--model", "/no/such/model"], ["/no/such/model"]),
        (["-"], ["the question is empty"]),
        ([], ["QUESTION", "mmv1 run --help"]),
    ],
)
def test_errors_before_the_engine_starts_are_one_sentence(arguments: list[str], words: list[str]) -> None:
    assert_one_sentence(mmv1("run", *arguments), *words)


@pytest.mark.slow
def test_one_question_from_the_shell(tmp_path: Path) -> None:
    """Every way to say it: the answer, and only it, is on stdout, and nothing on stderr."""
    word, shapes = PICTURES / "word.jpg", PICTURES / "shapes.jpg"
    for arguments, stdin, answer in (
        (("Which word is shown?", word), "", "HORSE\n"),
        ((MODEL_DIR, "-", shapes), "What color is the star?\n", "yellow\n"),
        (("--model", MODEL_DIR, "Describe this image.", word, "--max-tokens", "2", "--system", "Be brief."), "", None),
    ):
        result = mmv1("run", *arguments, stdin=stdin)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == answer or (answer is None and 0 < len(result.stdout.split()) <= 2)


@pytest.mark.slow
def test_ctrl_c_ends_it_and_all_it_started(tmp_path: Path) -> None:
    """A terminal's Ctrl-C goes to the whole process group, the engine's processes included."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmv1", "run", "Describe this image.", "--max-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    started = wait_until(lambda: len(children_of(process.pid)) >= 3 and children_of(process.pid), 60, "pool and engine start")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b""), err.decode()
    wait_until(lambda: not any(process_exists(pid) for pid in started), 30, "all of them end")


@pytest.mark.slow
def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert_one_sentence(mmv1("run", "What?", "notes.txt", cwd=tmp_path), "notes.txt: not a JPEG, PNG, WebP or GIF image")
    good = PICTURES / "word.jpg"
    assert_one_sentence(mmv1("run", "What?", good, "notes.txt", cwd=tmp_path), "image 2: not a JPEG, PNG, WebP or GIF image")
