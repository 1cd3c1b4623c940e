"""For tests of captioning: folders of small pictures, and a backend without a model whose captions follow from the pictures."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

from mmv1.batch import caption_job
from mmv1.batch.backend import Answer, Load
from mmv1.cli.main import main
from mmv1.errors import ImageError
from mmv1.preprocess.media import ImageLimits, accept_bytes
from tests.pictures import make_image

LIMITS = ImageLimits(max_encoded_bytes=1 << 20, max_pixels=1 << 24, max_side=1 << 14)


def caption_of(picture: bytes) -> str:
    return f"caption {blake3(picture).hexdigest(4)}"


def make_pictures(folder: Path, count: int, start: int = 0) -> dict[str, bytes]:
    """Different pictures in `folder` and below it: their bytes by their names."""
    made = {}
    for number in range(start, start + count):
        name = f"{'sub/' if number % 3 == 2 else ''}{number:03d}.{'png' if number % 2 else 'jpg'}"
        made[name] = make_image(32, 32, seed=number, format="PNG" if number % 2 else "JPEG")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(made[name])
    return made


def sidecars(folder: Path, extension: str = ".txt") -> dict[str, str]:
    """Text files below a folder, without the extension."""
    return {path.relative_to(folder).with_suffix("").as_posix(): path.read_text() for path in folder.rglob(f"*{extension}")}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class FakeBackend:
    """Answers like a server; `bodies` are the requests that came, `asked` counts pictures by their bytes. `answer_texts` makes
    the n answers of a request; `refuse` gives an error object where it wants to."""

    model_name = "fake"
    max_open = 4

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[bytes] = Counter()
        self.num_open = self.most_open = 0
        self.answer_texts: Callable[[dict[str, Any], bytes], list[str]] = (
            lambda body, picture: [caption_of(picture)] * body.get("n", 1)
        )
        self.refuse: Callable[[dict[str, Any], bytes], tuple[int, dict[str, Any]] | None] = lambda body, picture: None
        self.finish_reason = "stop"
        self.delay_s = 0.001

    async def ask(self, body: dict[str, Any]) -> Answer:
        content = body["messages"][-1]["content"]
        picture = content[0]["image_url"]["url"].data
        self.bodies.append(body)
        self.asked[picture] += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(self.delay_s)
        self.num_open -= 1
        if (refusal := self.refuse(body, picture)) is not None:
            return Answer(refusal[0], {"error": refusal[1]}, "")
        try:
            accept_bytes(picture, LIMITS)
        except ImageError as error:
            return Answer(400, {"error": {"message": error.message, "param": "messages", "code": error.code}}, "")
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish_reason}
            for index, text in enumerate(self.answer_texts(body, picture))
        ]
        return Answer(200, msgspec.json.decode(msgspec.json.encode({"choices": choices})), "")

    async def load(self) -> Load | None:
        return None

    async def close(self) -> None:
        pass


class Captioning:
    """`captioning("FOLDER", "--flag")`: the command on the fake backend; its exit status. `num_starts` of engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = FakeBackend()
        self.num_starts = 0

        @asynccontextmanager
        async def open_fake(url: str | None, args: Any) -> AsyncIterator[FakeBackend]:
            self.num_starts += 1
            yield self.backend

        monkeypatch.setattr(caption_job, "open_backend", open_fake)

    def __call__(self, *argv: object) -> int:
        return main(["caption", *map(str, argv)])


@pytest.fixture
def captioning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Captioning:
    monkeypatch.chdir(tmp_path)
    return Captioning(monkeypatch)
