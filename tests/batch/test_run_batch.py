"""`mmv1 run-batch` as a user runs it: the formats, what is wrong with lines, going on after anything, exit statuses."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openai.types import BatchError
from openai.types.chat import ChatCompletion

from mmv1.cli.main import main
from tests.batch.stub_server import MODEL, StubServer, reply_to, stub_server
from tests.integration.server import ROOT, image, serving, text
from tests.pictures import make_image
from tests.preprocess.processes import wait_until

Lines = list[dict[str, Any]]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with stub_server() as running:
        yield running


def request(custom_id: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | fields


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class Folder:
    """An input and its output in a folder; `run` is the command in this process, `start` in one of its own."""

    def __init__(self, path: Path, stub: StubServer | None) -> None:
        self.input, self.output = path / "in.jsonl", path / "out.jsonl"
        self.argv = ["run-batch", "-i", str(self.input), "-o", str(self.output)]
        if stub is not None:
            self.argv += ["--url", stub.url]

    def run(self, *more: str) -> int:
        return main([*self.argv, *more])

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mmv1", *self.argv, *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    @property
    def answers(self) -> Lines:
        return read(self.output)


@pytest.fixture
def folder(tmp_path: Path, stub: StubServer) -> Folder:
    return Folder(tmp_path, stub)


def test_every_line_gets_its_answer(folder: Folder, stub: StubServer) -> None:
    write(folder.input, [request(f"r{i}", f"prompt {i}") for i in range(300)])
    assert folder.run() == 0
    assert len(folder.answers) == 300
    for line in folder.answers:
        assert set(line) == {"id", "custom_id", "response", "error"} and line["error"] is None
        assert set(line["response"]) == {"status_code", "request_id", "body"}
        assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, "req-1")
        completion = ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert completion.choices[0].message.content == reply_to(f"prompt {line['custom_id'][1:]}")
    assert len({line["custom_id"] for line in folder.answers}) == len({line["id"] for line in folder.answers}) == 300
    assert set(stub.asked.values()) == {1}


FAULTY: list[tuple[bytes | dict[str, Any], str, str | None]] = [
    (b'{"custom_id": "torn', "invalid_json_line", None),
    (b"\xff\xfe", "invalid_json_line", None),
    (b"[" * 100_000, "invalid_json_line", None),
    (b"[]", "invalid_json_line", None),
    ({"method": "POST"}, "missing_required_parameter", None),
    (request("", "no name"), "missing_required_parameter", None),
    ({**request("x", "no text"), "custom_id": 7}, "missing_required_parameter", None),
    (request("good", "the same name"), "duplicate_custom_id", None),
    (request("good", "well"), "duplicate_custom_id", None),
    (request("get", "x", method="GET"), "invalid_method", "get"),
    (request("speech", "x", url="/v1/audio/speech"), "invalid_url", "speech"),
    (request("no url", "x", url=None), "invalid_url", "no url"),
    (request("body", "x", body=[1]), "missing_required_parameter", "body"),
]


def test_a_line_that_is_no_request_stops_nothing(folder: Folder, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder.input, [request("good", "well"), b"", *(line for line, _, _ in FAULTY), request("last", "end", extra=1)])
    assert folder.run() == 3
    assert "15 of 15 lines are answered, 13 are failures" in capsys.readouterr().err
    errors = [line for line in folder.answers if line["error"] is not None]
    assert sorted(stub.asked) == ["end", "well"]
    for number, (line, (_, code, custom_id)) in enumerate(zip(errors, FAULTY, strict=True), 3):
        error = BatchError.model_validate(line["error"], strict=True)
        assert (error.code, error.line, line["custom_id"], line["response"]) == (code, number, custom_id, None)
        assert error.message and error.message.startswith(f"line {number}: ")
    assert "that of line 1" in errors[7]["error"]["message"]
    before = folder.output.read_bytes()
    assert folder.run() == 3  # which is said again, and nothing is done again
    assert folder.output.read_bytes() == before and stub.asked.total() == 2


def test_embeddings_need_a_server(tmp_path: Path, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    here = Folder(tmp_path, None)
    write(here.input, [request("a", "x"), request("b", "x", url="/v1/embeddings", body={"model": MODEL, "input": "x"})])
    assert here.run() == 2
    assert "b is a request to /v1/embeddings: name a server that answers it with --url" in capsys.readouterr().err
    assert here.answers == []  # nothing that a run on a server would pass over


def test_a_byte_order_mark_is_no_fault(folder: Folder, stub: StubServer) -> None:
    write(folder.input, [request("a", "x")])
    folder.input.write_bytes(b"\xef\xbb\xbf" + folder.input.read_bytes())
    assert folder.run() == 0 and stub.asked == {"x": 1}


def test_a_request_that_is_refused_is_an_answer_with_its_status(folder: Folder) -> None:
    write(folder.input, [request("a", "x"), request("b", "y", body={**request("", "y")["body"], "model": "other"})])
    assert folder.run() == 3
    (refused,) = [line for line in folder.answers if line["custom_id"] == "b"]
    assert refused["error"] is None and refused["response"]["status_code"] == 404
    assert refused["response"]["body"]["error"]["message"] == "no model other"


def test_an_input_that_has_grown_is_gone_on_with(folder: Folder, stub: StubServer) -> None:
    lines = [request(f"r{i}", f"prompt {i}") for i in range(6)]
    write(folder.input, lines[:4])
    assert folder.run() == 0
    folder.input.write_bytes(folder.input.read_bytes().replace(b"\n", b"\r\n\n"))  # the same lines all the same
    with folder.input.open("ab") as file:
        file.write(b"\n".join(json.dumps(line).encode() for line in lines[4:]))  # the last without a newline
    assert folder.run() == 0
    assert sorted(line["custom_id"] for line in folder.answers) == [f"r{i}" for i in range(6)]
    assert set(stub.asked.values()) == {1}


def test_the_output_of_another_input_is_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder.input, [request("a", "x"), request("b", "y")])
    assert folder.run() == 0
    before = folder.output.read_bytes()
    position = [line["custom_id"] for line in folder.answers].index("b") + 1
    write(folder.input, [request("a", "x"), request("b", "changed")])
    assert folder.run() == 2
    assert f"1 of the answers in --output-file, the first in its line {position}, are to lines" in capsys.readouterr().err
    assert folder.output.read_bytes() == before
    folder.output.write_bytes(b"".join(line for line in before.splitlines(keepends=True) if b'"custom_id":"b"' not in line))
    assert folder.run() == 0
    assert {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in folder.answers} == {
        "a": reply_to("x"),
        "b": reply_to("changed"),
    }


def test_settings_that_cannot_work_are_said_before_anything_is_done(
    folder: Folder, stub: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.run() == 2 and "is not there" in capsys.readouterr().err
    assert not folder.output.exists()
    write(folder.input, [request("a", "x")])
    assert folder.run("--max-inflight", "0") == 2 and "at least 1" in capsys.readouterr().err
    assert folder.run("--max-pixels", "10000") == 2 and "--max-pixels cannot be given with --url" in capsys.readouterr().err
    folder.output.write_text('{"not": "an answer"}')
    assert folder.run() == 2 and "was not written by this command" in capsys.readouterr().err
    assert folder.output.read_text() == '{"not": "an answer"}'
    folder.argv[4] = folder.argv[2]
    assert folder.run() == 2 and "the same file" in capsys.readouterr().err
    assert not stub.asked


def test_no_more_than_max_inflight_are_open(folder: Folder, stub: StubServer) -> None:
    stub.hold = threading.Event()
    write(folder.input, [request(f"r{i}", f"prompt {i}") for i in range(20)])
    process = folder.start("--max-inflight", "3")
    try:
        wait_until(lambda: stub.asked.total() == 3)
        with pytest.raises(TimeoutError):
            wait_until(lambda: stub.asked.total() > 3, 0.5)
        assert stub.num_connections <= 4  # one asked for the models
        stub.hold.set()
        assert process.wait(30) == 0, process.stderr
    finally:
        process.kill()
        process.communicate()
    assert stub.asked.total() == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_what_is_begun_and_says_how_to_go_on(folder: Folder, stub: StubServer, number: signal.Signals) -> None:
    stub.hold = threading.Event()
    write(folder.input, [request(f"r{i}", f"prompt {i}") for i in range(40)])
    process = folder.start("--max-inflight", "8")
    try:
        wait_until(lambda: stub.asked.total() == 8)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        stub.hold.set()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stub.asked.total() == len(folder.answers) == 8
    assert "8 of 40 lines are answered" in errors
    (command,) = [line.partition(": ")[2] for line in errors.splitlines() if "with the same command" in line]
    assert shlex.split(command) == ["mmv1", *folder.argv, "--max-inflight", "8"]
    assert main(shlex.split(command)[1:]) == 0
    assert set(stub.asked.values()) == {1} and len(folder.answers) == 40


def test_a_second_signal_ends_it_at_once(folder: Folder, stub: StubServer) -> None:
    stub.hold = threading.Event()
    write(folder.input, [request(f"r{i}", f"prompt {i}") for i in range(40)])
    process = folder.start("--max-inflight", "8")
    try:
        wait_until(lambda: stub.asked.total() == 8)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.communicate()
        stub.hold.set()
    assert folder.answers == []


def test_a_server_that_dies_ends_the_run_and_what_is_answered_is_kept(
    folder: Folder, stub: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (503, {}) if stub.num_answered >= 5 else real_answer(body)

    real_answer = stub.answer
    monkeypatch.setattr(stub, "answer", answer)
    monkeypatch.setattr("mmv1.batch.backend._pause", lambda num_tries: 0.01)
    monkeypatch.setattr("mmv1.batch.backend.ServerBackend.connect.__func__.__defaults__", ("", 0.2))
    write(folder.input, [request(f"r{i}", f"prompt {i}") for i in range(20)])
    assert folder.run("--max-inflight", "1") == 1
    assert "has not answered for 0 s: status 503" in capsys.readouterr().err
    assert len(folder.answers) == 5
    monkeypatch.setattr(stub, "answer", real_answer)
    assert folder.run() == 0 and len(folder.answers) == 20


def contents(lines: Lines) -> dict[str, Any]:
    """What an output says, by custom_id; that each is there once is checked."""
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    said: dict[str, Any] = {}
    for custom_id, line in by_id.items():
        body = line["response"]["body"]
        said[custom_id] = body["error"] if "error" in body else [
            (choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"])
            for choice in body["choices"]
        ]  # fmt: skip
    return said


def kill_at(process: subprocess.Popen[str], moment: Callable[[], Any]) -> None:
    try:
        wait_until(lambda: moment() or process.poll() is not None, 60)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_as_if_it_never_was(tmp_path: Path) -> None:
    num_requests, num_kills, chance = 1200, 20, random.Random(11)
    lines = [request(f"r{i}", f"prompt {i} " + "x" * chance.randrange(2000)) for i in range(num_requests)]
    with stub_server(max_delay_s=0.02) as stub:
        (tmp_path / "whole").mkdir()
        uninterrupted = Folder(tmp_path / "whole", stub)
        write(uninterrupted.input, lines)
        assert uninterrupted.run() == 0
        stub.asked.clear()
        stub.num_answered = 0

        folder = Folder(tmp_path, stub)
        write(folder.input, lines)
        sizes = []
        for _ in range(num_kills):
            process = folder.start("--max-inflight", "16")
            at = stub.num_answered + chance.randrange(1, 60)
            kill_at(process, lambda at=at: stub.num_answered >= at)
            assert process.returncode == -signal.SIGKILL
            sizes.append(len(folder.output.read_bytes().splitlines()) if folder.output.exists() else 0)
        assert sizes == sorted(sizes) and 0 < sizes[-1] < num_requests and len(set(sizes)) > num_kills // 4
        assert folder.run() == 0
        assert contents(folder.answers) == contents(uninterrupted.answers) and len(folder.answers) == num_requests
        # What is asked twice was open, or in the last moments before a kill.
        assert stub.asked.total() - num_requests < num_kills * (16 + 60)


@pytest.mark.slow
def test_an_engine_of_its_own_killed_and_gone_on_with_answers_as_a_server_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"model": "tiny", "temperature": 0, "max_tokens": 6}

    def about(content: Any, **more: Any) -> dict[str, Any]:
        return {**options, "messages": [{"role": "user", "content": content}], **more}

    pictures = [make_image(60 + 8 * i, 80, seed=i) for i in range(12)]
    bodies = [about([image(picture), text(f"What is picture {i}?")]) for i, picture in enumerate(pictures)]
    bodies += [about(f"Say {i}", logprobs=True, top_logprobs=1) for i in range(12)]
    bodies += [
        *(about([image(url), text()]) for url in (b"no picture", "file:///etc/hostname", "/etc/hostname")),
        *(about("x", **wrong) for wrong in ({"model": "other"}, {"n": 99}, {"max_tokens": 10**6}, {"stream": True})),
        {"model": "tiny"},
    ]  # fmt: skip
    lines = [request(f"r{i}", "", body=body) for i, body in enumerate(bodies)]
    lines.append(request("completion", "", url="/v1/completions", body={**options, "prompt": "Once", "n": 2, "seed": 1}))
    outputs = {}
    with serving(tiny_model_dir, tmp_path) as server:
        remote = Folder(tmp_path, None)
        write(remote.input, lines)
        assert remote.run("--url", server.url) == 3
        outputs["server"] = contents(remote.answers)
        remote.output.unlink()
    local = Folder(tmp_path, None)
    local.argv += ["--model", str(tiny_model_dir), "--served-model-name", "tiny", "--max-num-seqs", "2"]
    kill_at(local.start(), lambda: local.output.exists() and local.output.read_bytes().count(b"\n") >= 3)
    assert 3 <= local.output.read_bytes().count(b"\n") < len(lines)
    process = local.start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    outputs["here"] = contents(local.answers)
    assert outputs["here"] == outputs["server"] and len(outputs["here"]) == len(lines)
    assert sum(isinstance(answer, dict) for answer in outputs["here"].values()) == 8
