"""The two ends of the process without the model: batches and their faults on one, places and last answers on the other."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mmv1 import child
from mmv1.embedding import client as client_module
from mmv1.embedding.client import ClipProcess
from mmv1.embedding.clip_process import _batches, _embed
from mmv1.embedding.messages import (
    ANSWERS_SOCKET,
    JOBS_SOCKET,
    ClipJob,
    ClipReady,
    Embedded,
    EmbedPicture,
    EmbedText,
    NotEmbedded,
)
from mmv1.errors import ConfigError, ContextLengthError, EmbedderDeadError, ImageError, RequestError
from mmv1.wire import AsyncReceiver, AsyncSender, Receiver, Sender, ipc_address, new_runtime_dir


class FakeModel:
    """Notes its batches. A text "long" is too long, and "odd" one that the tokenizer fails at; a picture b"bad" is damaged."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def tokens(self, text: str, *, truncate: bool) -> tuple[str, int]:
        if text == "long" and not truncate:
            raise ContextLengthError("too long")
        if text == "odd":
            raise KeyError(text)
        return text, len(text)

    def pixels(self, encoded: bytes) -> bytes:
        if encoded == b"bad":
            raise ImageError("damaged", code="invalid_image")
        return encoded

    def pixels_at(self, slab: memoryview, offset: int) -> bytes:
        return bytes(slab[offset : offset + 2])

    def encode_pictures(self, pictures: list[bytes]) -> list[bytes]:
        self.batches.append(pictures)
        return [b"p" + picture for picture in pictures]

    def encode_texts(self, texts: list[str]) -> list[bytes]:
        self.batches.append(texts)
        return [b"t" + text.encode() for text in texts]


def test_what_has_come_is_one_batch_and_each_job_has_its_answer() -> None:
    folder = new_runtime_dir()
    jobs: Receiver[ClipJob] = Receiver(ipc_address(folder, "jobs"), ClipJob, bind=True)
    sender = Sender(ipc_address(folder, "jobs"))
    given: list[tuple[ClipJob, bytes | None]] = [
        (EmbedText(0, "ab", False), None), (EmbedPicture(1), b"xy"), (EmbedText(2, "long", False), None),
        (EmbedPicture(3, 1), None), (EmbedPicture(4), b"bad"), (EmbedText(5, "odd", False), None),
        (EmbedText(6, "long", True), None),
    ]  # fmt: skip
    for job, payload in given:
        sender.send(job, payload)
    answers: list[Any] = []
    model = FakeModel()
    batches = _batches(jobs)
    while len(answers) < len(given):
        answers_of_batch = type("Answers", (), {"send": lambda self, answer: answers.append(answer)})()
        _embed(model, memoryview(b"0123"), next(batches), answers_of_batch)  # type: ignore[arg-type]
    assert {answer.job_id: answer for answer in answers} == {
        0: Embedded(0, b"tab", 2), 1: Embedded(1, b"pxy"), 2: NotEmbedded(2, "too long", "context_length_exceeded"),
        3: Embedded(3, b"p12"), 4: NotEmbedded(4, "damaged", "invalid_image"),
        5: NotEmbedded(5, "the input cannot be read", "invalid_value"), 6: Embedded(6, b"tlong", 4),
    }  # fmt: skip
    assert sum(map(len, model.batches)) == 4
    jobs.close()
    sender.close()
    folder.joinpath("jobs").unlink(missing_ok=True)
    folder.rmdir()


class Stub:
    """A ClipProcess whose process does nothing: the test answers in its place."""

    def __init__(self, process: ClipProcess) -> None:
        self.process = process
        folder = process._runtime_dir
        self.jobs: AsyncReceiver[ClipJob] = AsyncReceiver(ipc_address(folder, JOBS_SOCKET), ClipJob)
        self.answers = AsyncSender(ipc_address(folder, ANSWERS_SOCKET))

    async def next_jobs(self, number: int) -> list[int]:
        return [(await asyncio.wait_for(self.jobs.recv(), 10)).job_id for _ in range(number)]


def with_stub(use: Callable[[Stub], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(module: str, *args: str, **options: Any) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)

    monkeypatch.setattr(child, "start", start)
    monkeypatch.setattr(client_module, "_MAX_JOBS", 2)

    async def run() -> None:
        process = ClipProcess("a:b", flag="--flag")
        await process.start()
        stub = Stub(process)
        try:
            await use(stub)
        finally:
            await process.close()
            stub.jobs.close()
            stub.answers.close()
        assert not process._runtime_dir.exists()

    asyncio.run(run())


def test_no_more_jobs_are_in_the_process_than_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody waits for any more keeps its place until it is answered."""

    async def use(stub: Stub) -> None:
        works = [asyncio.ensure_future(stub.process.embed_text(str(i), truncate=False)) for i in range(4)]
        assert await stub.next_jobs(2) == [0, 1]
        works[0].cancel()
        works[3].cancel()
        await asyncio.gather(works[0], works[3], return_exceptions=True)
        assert set(stub.process._waiting) == {0, 1} and stub.process._places.locked()
        await stub.answers.send(Embedded(0, b"0"))
        assert await stub.next_jobs(1) == [2]
        await stub.answers.send(NotEmbedded(1, "too long", "context_length_exceeded"))
        with pytest.raises(RequestError, match="too long"):
            await works[1]
        await stub.answers.send(Embedded(2, b"2", 7))
        assert await works[2] == Embedded(2, b"2", 7)
        picture = asyncio.ensure_future(stub.process.embed_picture(b"x"))
        (job_id,) = await stub.next_jobs(1)
        await stub.answers.send(NotEmbedded(job_id, "damaged", "invalid_image"))
        with pytest.raises(ImageError, match="damaged"):
            await picture
        assert not stub.process._waiting and stub.process._places._value == 2

    with_stub(use, monkeypatch)


def test_a_process_that_ends_or_talks_nonsense_fails_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(stub: Stub) -> None:
        works = [asyncio.ensure_future(stub.process.embed_pixels(i)) for i in range(3)]
        await stub.next_jobs(2)
        await stub.answers.send_frame(b"nonsense")
        for result in await asyncio.wait_for(asyncio.gather(*works, return_exceptions=True), 10):
            assert isinstance(result, EmbedderDeadError)
        assert await stub.process.wait_ended() != 0
        with pytest.raises(ConfigError, match="--flag a:b cannot be loaded: its process ended"):
            await stub.process.wait_ready()

    with_stub(use, monkeypatch)


def test_what_a_process_said_before_it_ended_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(stub: Stub) -> None:
        assert stub.process._process.stdin is not None
        stub.process._process.stdin.close()
        assert await stub.process._process.wait() == 1
        await asyncio.sleep(0.3)
        await stub.answers.send(ClipReady(error="no such tag"))
        with pytest.raises(ConfigError, match="--flag a:b cannot be loaded: no such tag"):
            await asyncio.wait_for(stub.process.wait_ready(), 10)

    with_stub(use, monkeypatch)


def test_a_model_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(stub: Stub) -> None:
        await stub.answers.send(ClipReady(error="no such tag"))
        with pytest.raises(ConfigError, match="--flag a:b cannot be loaded: no such tag"):
            await asyncio.wait_for(stub.process.wait_ready(), 10)

    with_stub(use, monkeypatch)
