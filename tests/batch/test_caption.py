"""The command: every kind of output, going on, beginning anew, what fails, what is said. On a backend without a model."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import termios
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from mmv1.batch import caption_job
from mmv1.batch.caption import DEFAULT_PROMPT
from mmv1.errors import ConfigError, EngineDeadError
from tests.batch.captioning import Captioning, caption_of, captioning, make_pictures, rows, sidecars
from tests.integration.server import ROOT, wait_until

__all__ = ["captioning"]  # a fixture


def stems(made: dict[str, bytes]) -> dict[str, str]:
    """What sidecars must hold."""
    return {name.rpartition(".")[0]: caption_of(data) + "\n" for name, data in made.items()}


def shards(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Members of every finished shard."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found[path.name] = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    return found


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "unfinished" in path.name]


def test_text_files_beside_the_pictures(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 7)
    assert captioning("p", "--prompt", "What?", "--system", "Be brief.", "--max-tokens", 9, "--max-pixels", 5000) == 0
    assert sidecars(Path("p")) == stems(made)
    assert not unfinished(Path("p")) and not Path("p/errors.jsonl").exists()
    assert {row["key"]: row["caption"] for row in rows(Path("p/captions.jsonl"))} == {
        name: caption_of(data) for name, data in made.items()
    }
    body = captioning.backend.bodies[0]
    text = {"type": "text", "text": "What?"}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["messages"][1]["content"][1] == text
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake", 9, 0.0)
    assert body["mm_processor_kwargs"] == {"max_pixels": 5000} and "seed" not in body and "n" not in body


def test_another_extension(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 3)
    assert captioning("p", "--caption-extension", "caption") == 0
    assert sidecars(Path("p"), ".caption") == stems(made) and not sidecars(Path("p"))


def test_jsonl_and_parquet(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 7)
    expected = {name: caption_of(data) for name, data in made.items()}
    assert captioning("p", "--output", "out/a.jsonl") == 0
    assert {row["key"]: row["caption"] for row in rows(Path("out/a.jsonl"))} == expected
    assert captioning("p", "--output", "out/a.parquet") == 0
    table = pyarrow.parquet.read_table("out/a.parquet").to_pylist()
    assert {row["key"]: row["caption"] for row in table} == expected and len(table) == 7
    assert captioning("p", "--output", "out/a.parquet") == 0 and captioning.num_starts == 2
    assert captioning("p", "--output", "out/a.csv") == 2


def test_webdataset_shards(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 7)
    assert captioning("p", "--output", "wds:out", "--samples-per-shard", 3) == 0
    found = shards(Path("out"))
    assert [len(members) for members in found.values()] == [9, 9, 3] and list(found) == ["00000.tar", "00001.tar", "00002.tar"]
    seen = {}
    for members in found.values():
        for (image, data), (text, caption), (meta, row) in zip(members[::3], members[1::3], members[2::3], strict=True):
            name, _, extension = image.partition(".")
            assert (text, meta) == (f"{name}.txt", f"{name}.json")
            key = json.loads(row)["key"]
            assert extension == key.rpartition(".")[2] and made[key] == data and caption.decode() == caption_of(data)
            seen[key] = data
    assert seen == made
    assert captioning("out/{00000..00002}.tar", "--output", "again.jsonl") == 0  # what is written can be read
    assert len(rows(Path("again.jsonl"))) == 7


def test_a_shard_that_was_not_finished_is_written_again_without_the_model(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 7)
    assert captioning("p", "--output", "wds:out", "--samples-per-shard", 3) == 0
    Path("out/00001.tar").rename("out/.00001.tar.unfinished")  # as if killed before it was renamed
    asked = sum(captioning.backend.asked.values())
    assert captioning("p", "--output", "wds:out", "--samples-per-shard", 3) == 0
    assert sum(captioning.backend.asked.values()) == asked
    members = [member for shard in shards(Path("out")).values() for member in shard]
    keys = [json.loads(data)["key"] for name, data in members if name.endswith("json")]
    assert sorted(keys) == sorted(made) and len(rows(Path("out/captions.jsonl"))) == 7


def test_shards_of_somebody_else_are_not_written_into(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("p"), 2)
    Path("out").mkdir()
    Path("out/00000.tar").write_bytes(b"")
    assert captioning("p", "--output", "wds:out") == 2
    assert "was not written by this tool" in capsys.readouterr().err


def test_what_is_done_is_not_done_again_and_no_engine_starts_for_it(
    captioning: Captioning, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(Path("p"), 5)
    assert captioning("p") == 0
    make_pictures(Path("p"), 3, start=5)
    assert captioning("p") == 0
    assert set(captioning.backend.asked.values()) == {1} and len(captioning.backend.asked) == 8
    assert captioning("p") == 0 and captioning.num_starts == 2
    assert "Nothing to do: all 8 pictures have their captions" in capsys.readouterr().err


def test_a_deleted_text_file_comes_back_from_the_log(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 5)
    captioning("p")
    Path("p/000.txt").unlink()
    assert captioning("p") == 0 and sidecars(Path("p")) == stems(made)
    assert set(captioning.backend.asked.values()) == {1} and len(rows(Path("p/captions.jsonl"))) == 5


@pytest.mark.parametrize("flags", [["--prompt", "Why?"], ["--max-tokens", "5"], ["--max-pixels", "9999"], ["--temperature", "1"]])
def test_a_changed_question_is_new_work_and_nothing_is_lost(
    captioning: Captioning, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    made = make_pictures(Path("p"), 4)
    captioning("p")
    captioning.backend.answer_texts = lambda body, picture: ["new"]
    assert captioning("p", *flags) == 0
    assert set(sidecars(Path("p")).values()) == {"new\n"} and set(captioning.backend.asked.values()) == {2}
    told = capsys.readouterr().err
    assert "captioned anew" in told and flags[0].strip("-").replace("-", "_") in told
    assert {row["caption"] for row in rows(Path("p/captions.jsonl.previous-1"))} == {caption_of(data) for data in made.values()}
    assert len(rows(Path("p/captions.jsonl"))) == 4


@pytest.mark.parametrize("flags", [["--prompt", "Other?"], ["--overwrite"]])
def test_a_run_that_cannot_begin_sets_nothing_aside(
    captioning: Captioning, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    @asynccontextmanager
    async def fail(url: str | None, args: Any) -> AsyncIterator[None]:
        raise ConfigError("no memory is left")
        yield

    made = make_pictures(Path("p"), 2)
    assert captioning("p") == 0
    with monkeypatch.context() as patch:
        patch.setattr(caption_job, "open_backend", fail)
        assert captioning("p", *flags) == 2
    assert not list(Path("p").glob("*previous*")) and sidecars(Path("p")) == stems(made)
    starts = captioning.num_starts
    assert captioning("p") == 0 and captioning.num_starts == starts  # it has nothing to do


def test_another_seed_is_no_new_work(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    captioning("p", "--temperature", 1)
    seeds = [body["seed"] for body in captioning.backend.bodies]
    assert captioning("p", "--temperature", 1, "--seed", 7) == 0 and len(captioning.backend.bodies) == 2
    assert captioning("p", "--temperature", 1, "--seed", 7, "--overwrite") == 0
    again = [body["seed"] for body in captioning.backend.bodies[2:]]
    assert len({*seeds, *again}) == 4 and sorted(again) == sorted(seed + 7 for seed in seeds)


def test_a_run_under_new_settings_that_was_killed_goes_on_with_them(captioning: Captioning) -> None:
    """Between the log and the text file: the old caption must not pass for the new one."""
    make_pictures(Path("p"), 4)
    captioning("p")
    captioning.backend.answer_texts = lambda body, picture: ["new"]
    assert captioning("p", "--prompt", "Other?", "--limit", 2) == 0
    assert sorted(sidecars(Path("p")).values()).count("new\n") == 2
    assert captioning("p", "--prompt", "Other?") == 0
    assert set(sidecars(Path("p")).values()) == {"new\n"} and sum(captioning.backend.asked.values()) == 8


def test_somebody_elses_text_files_are_left_alone_unless_told(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_pictures(Path("p"), 4)
    Path("p/000.txt").write_text("mine")
    assert captioning("p") == 0
    assert sidecars(Path("p")) == stems(made) | {"000": "mine"}
    assert "1 pictures have a text file that this command did not write" in capsys.readouterr().err
    captioning("p", "--overwrite", "--limit", 1)
    assert captioning("p") == 0  # a run with --overwrite that was interrupted goes on without
    assert sidecars(Path("p")) == stems(made)


def test_overwrite_captions_everything_again(captioning: Captioning) -> None:
    make_pictures(Path("p"), 4)
    for output in ("a.jsonl", "a.parquet", "wds:out"):
        captioning.backend.asked.clear()
        captioning("p", "--output", output)
        captioning.backend.answer_texts = lambda body, picture: ["new"]
        assert captioning("p", "--output", output, "--overwrite") == 0
        assert set(captioning.backend.asked.values()) == {2}, output
    assert [row["caption"] for row in rows(Path("a.jsonl"))] == ["new"] * 4
    assert pyarrow.parquet.read_table("a.parquet").column("caption").to_pylist() == ["new"] * 4
    assert [data for members in shards(Path("out")).values() for name, data in members if name.endswith("txt")] == [b"new"] * 4


def test_files_that_this_command_did_not_write_are_not_touched(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    Path("a.jsonl").write_text('{"text": "mine"}\n')
    Path("a.parquet").write_text("mine")
    assert captioning("p", "--output", "a.jsonl") == captioning("p", "--output", "a.parquet") == 2
    assert Path("a.jsonl").read_text() == '{"text": "mine"}\n' and Path("a.parquet").read_text() == "mine"


def test_what_cannot_be_captioned_is_written_down_and_tried_again_next_time(
    captioning: Captioning, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_pictures(Path("p"), 4)
    Path("p/bad.jpg").write_bytes(b"no picture")
    Path("p/gone.jpg").symlink_to("nowhere")
    assert captioning("p") == 3
    assert sidecars(Path("p")) == stems(made)
    errors = {row["key"]: row for row in rows(Path("p/errors.jsonl"))}
    assert set(errors) == {"bad.jpg", "gone.jpg"} and errors["gone.jpg"]["code"] == "image_fetch_failed"
    assert "2 failed: p/errors.jsonl says why" in capsys.readouterr().err
    made |= {"bad.jpg": make_pictures(Path("other"), 1, start=30)["030.jpg"]}
    Path("p/bad.jpg").write_bytes(made["bad.jpg"])
    Path("p/gone.jpg").unlink()
    assert captioning("p") == 0 and sidecars(Path("p")) == stems(made) and not Path("p/errors.jsonl").exists()


def test_the_same_bytes_are_asked_about_once_also_in_a_later_run(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 3)
    for number in range(5):
        Path(f"p/copy{number}.jpg").write_bytes(made["000.jpg"])
    assert captioning("p") == 0
    assert set(captioning.backend.asked.values()) == {1} and len(sidecars(Path("p"))) == 8
    Path("p/late.jpg").write_bytes(made["000.jpg"])
    assert captioning("p") == 0
    assert set(captioning.backend.asked.values()) == {1} and Path("p/late.txt").read_text() == Path("p/000.txt").read_text()


def test_two_pictures_of_one_text_file(captioning: Captioning) -> None:
    make_pictures(Path("p"), 1)
    Path("p/000.png").write_bytes(make_pictures(Path("other"), 2)["001.png"])
    for _ in range(2):
        assert captioning("p") == 3
        (error,) = rows(Path("p/errors.jsonl"))
        assert error["key"] == "000.png" and "--output" in error["message"]
    assert captioning("p", "--output", "a.jsonl") == 0 and len(rows(Path("a.jsonl"))) == 2


def test_a_picture_that_is_listed_twice_has_one_row(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    Path("list.txt").write_text("p/000.jpg\np/001.png\np/./000.jpg\n")
    assert captioning("list.txt", "--output", "a.jsonl") == 0
    assert sorted(row["key"] for row in rows(Path("a.jsonl"))) == ["p/000.jpg", "p/001.png"]


def test_shares_and_limit(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 12)
    for index in range(3):
        assert captioning("p", "--output", "a.jsonl", "--shard", f"{index}/3") == 0
    parts = [{row["key"] for row in rows(Path(f"a.{index}-of-3.jsonl"))} for index in range(3)]
    assert set.union(*parts) == set(made) and sum(map(len, parts)) == 12
    assert captioning("p", "--output", "wds:out", "--shard", "1/3") == 0 and shards(Path("out")).keys() == {"1-of-3-00000.tar"}
    for _ in range(2):
        assert captioning("p", "--output", "b.jsonl", "--limit", 5) == 0
        assert sorted(row["key"] for row in rows(Path("b.jsonl"))) == sorted(made)[:5]


def test_rows_need_a_place_for_captions(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_pictures(Path("p"), 2)
    Path("rows.jsonl").write_text('{"image": "p/000.jpg"}\n{"image": "data:image/png;base64,eA=="}\n')
    assert captioning("rows.jsonl") == 2
    assert "give --output" in capsys.readouterr().err
    assert captioning("rows.jsonl", "--limit", 1) == 0 and Path("p/000.txt").read_text() == caption_of(made["000.jpg"]) + "\n"


def test_no_pictures_is_said(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p").mkdir()
    assert captioning("p") == 2
    assert "there are no pictures in p" in capsys.readouterr().err


def test_a_fault_of_the_settings_ends_the_run_at_once(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("p"), 30)
    captioning.backend.refuse = lambda body, picture: (400, {"message": "top_p: too high", "param": "top_p", "code": "x"})
    assert captioning("p", "--top-p", 1, "--max-inflight", 4) == 2
    assert "no picture can be asked about like this: top_p: too high" in capsys.readouterr().err
    assert len(captioning.backend.bodies) <= 4


def test_an_engine_that_dies_leaves_what_was_done(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_pictures(Path("p"), 12)

    def die_late(body: dict[str, Any], picture: bytes) -> None:
        if len(captioning.backend.bodies) > 6:
            raise EngineDeadError("the engine stopped")

    captioning.backend.refuse = die_late
    assert captioning("p", "--max-inflight", 2) == 1
    told = capsys.readouterr().err
    assert "The rest, with the same command" in told and "the engine stopped" in told
    assert 0 < len(sidecars(Path("p"))) < 12
    captioning.backend.refuse = lambda body, picture: None
    assert captioning("p") == 0 and sidecars(Path("p")) == stems(made)


def test_an_output_is_written_by_one_run_at_a_time(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    inner = []

    def run_another(body: dict[str, Any], picture: bytes) -> None:
        if not inner:
            command = [sys.executable, "-m", "mmv1", "caption", "p", "--prompt", "Another question"]
            inner.append(subprocess.run(command, capture_output=True, text=True, check=False, timeout=60))

    captioning.backend.refuse = run_another
    assert captioning("p") == 0
    assert inner[0].returncode == 2 and "another run" in inner[0].stderr
    assert len(rows(Path("p/captions.jsonl"))) == 2 and not list(Path("p").glob("*previous*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-captions", "2", "--temperature", "0"], "give a higher one"),
        (["--schema", "s.json", "--num-captions", "2"], "leave out --num-captions"),
        (["--schema", "s.json", "--rank", "clip"], "does not go with --rank"),
        (["--schema", "gone.json"], "gone.json cannot be read (No such file or directory)"),
        (["--schema", "bad.json"], "no JSON schema"),
        (["--prompt-file", "gone.txt"], "gone.txt cannot be read (No such file or directory)"),
        (["--clip-model", "x:y"], "does nothing by itself"),
        (["--temperature", "-1"], "temperature must be a number from 0"),
        (["--top-p", "2"], "top_p must be a number above 0"),
        (["--num-captions", "1000"], "n must be an integer from 1 to 256"),
    ],
)
def test_settings_that_cannot_work(
    captioning: Captioning, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    make_pictures(Path("p"), 1)
    Path("s.json").write_text('{"type": "object"}')
    Path("bad.json").write_text('{"type": "no such type"}')
    assert captioning("p", *flags) == 2
    assert words in capsys.readouterr().err and captioning.num_starts == 0


@pytest.mark.parametrize("flags", [
    ["--shard", "2/2"], ["--shard", "x"], ["--limit", "0"], ["--temperature", "nan"], ["--min-clip-score", "inf"],
    ["--prompt", "a", "--prompt-file", "b"],
])  # fmt: skip
def test_flags_that_are_none(captioning: Captioning, flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        captioning("p", *flags)


def test_prompt_from_a_file_and_by_default(captioning: Captioning) -> None:
    make_pictures(Path("p"), 1)
    Path("prompt.txt").write_text("Was ist das? é\n")
    captioning("p", "--prompt-file", "prompt.txt")
    captioning("p")
    texts = [body["messages"][-1]["content"][1]["text"] for body in captioning.backend.bodies]
    assert texts == ["Was ist das? é", DEFAULT_PROMPT]


def test_captions_that_were_cut_are_marked(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("p"), 2)
    captioning.backend.finish_reason = "length"
    assert captioning("p") == 0
    assert all(row["is_cut"] for row in rows(Path("p/captions.jsonl")))
    assert "2 captions were cut at --max-tokens 256" in capsys.readouterr().err


def test_progress_goes_to_stderr_and_nothing_to_stdout(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("p"), 3)
    captioning("p")
    captured = capsys.readouterr()
    assert captured.out == "" and "3 pictures captioned" in captured.err


def test_only_so_many_pictures_are_under_way(captioning: Captioning) -> None:
    make_pictures(Path("p"), 12)
    captioning.backend.delay_s = 0.05  # long beside the reading of a picture
    captioning("p", "--max-inflight", 3)
    assert captioning.backend.most_open == 3


def test_pictures_from_standard_input(captioning: Captioning, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(Path("p"), 2)
    Path("list").write_text("p/000.jpg\np/001.png\n")
    with Path("list").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert captioning("-") == 0
    assert len(sidecars(Path("p"))) == 2 and len(rows(Path("captions.jsonl"))) == 2


def test_interrupted_it_does_not_wait_for_a_standard_input_that_says_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-P", "-m", "mmv1", "caption", "-"], cwd=tmp_path, env=environment,
                               stdin=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b"half a li")
    process.stdin.flush()
    unread, pipe = array("i", [1]), process.stdin.fileno()
    wait_until(lambda: fcntl.ioctl(pipe, termios.FIONREAD, unread) == 0 and unread[0] == 0, 60, "it reads its input")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == b""


def test_settings_that_are_damaged_are_no_obstacle_to_overwrite(
    captioning: Captioning, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_pictures(Path("p"), 2)
    assert captioning("p") == 0
    Path("p/captions.settings.json").write_text("{")
    assert captioning("p") == 2 and "start anew with --overwrite" in capsys.readouterr().err
    assert captioning("p", "--overwrite") == 0 and sidecars(Path("p")) == stems(made)
    assert set(captioning.backend.asked.values()) == {2}


def test_a_log_without_captions_is_not_set_aside(captioning: Captioning) -> None:
    make_pictures(Path("p"), 1)
    captioning.backend.refuse = lambda body, picture: (404, {"message": "gone"})
    assert captioning("p") == captioning("p", "--prompt", "Other?") == 2
    assert not list(Path("p").glob("*previous*"))


def test_rows_of_one_key_with_different_pictures_are_not_taken_for_one(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    lines = [{"image": "p/000.jpg", "id": 1}, {"image": "p/001.png", "id": 1}, {"image": "p/./000.jpg", "id": 1}]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert captioning("rows.jsonl", "--key-column", "id", "--output", "a.jsonl") == 3
    assert len(rows(Path("a.jsonl"))) == 1
    (error,) = rows(Path("a.errors.jsonl"))
    assert error["key"] == "1" and "another picture has the same key" in error["message"]


def test_shards_of_one_name_in_two_folders_are_both_captioned(captioning: Captioning) -> None:
    for index, folder in enumerate("ab"):
        make_pictures(Path("p", folder), 2, start=2 * index)
        assert captioning(f"p/{folder}", "--output", f"wds:{folder}") == 0
    assert captioning("a/00000.tar", "b/00000.tar", "--output", "all.jsonl") == 0
    assert len(rows(Path("all.jsonl"))) == 4


def test_names_that_no_file_can_have_do_not_end_the_run(captioning: Captioning) -> None:
    made = make_pictures(Path("p"), 1)
    names = [".", "/", "x" * 300 + ".jpg", "a\0.jpg", "\ud800.jpg", "p/000.jpg"]
    Path("rows.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    for flags in ([], ["--output", "a.jsonl"], ["--output", "wds:out"]):
        assert captioning("rows.jsonl", *flags) == 3
    assert sidecars(Path("p")) == stems(made) and len(rows(Path("a.jsonl"))) == 1 and len(rows(Path("a.errors.jsonl"))) == 5


def test_a_share_without_pictures_has_nothing_to_do(captioning: Captioning, capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("p"), 1)
    assert [captioning("p", "--shard", f"{index}/4") for index in range(4)] == [0] * 4
    assert capsys.readouterr().err.count("Nothing to do: no picture is in this share") == 3


def test_an_overwrite_that_is_finished_overwrites_nothing_later(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    Path("p/bad.jpg").write_bytes(b"no picture")
    assert captioning("p", "--overwrite") == 3
    make_pictures(Path("p"), 2, start=3)
    Path("p/003.txt").write_text("mine")
    assert captioning("p") == 3
    assert sidecars(Path("p"))["003"] == "mine"


def test_text_files_left_alone_are_told_also_when_nothing_is_done(
    captioning: Captioning, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(Path("p"), 1)
    Path("p/000.txt").write_text("mine")
    assert captioning("p") == 0
    assert "1 pictures have a text file that this command did not write" in capsys.readouterr().err
