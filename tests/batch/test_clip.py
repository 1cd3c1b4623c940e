"""Scores against open_clip itself, called directly, on a tiny model with random weights; and what happens to its process."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image

from mmv1.batch.clip import ClipScorer
from mmv1.errors import ConfigError, EngineDeadError, ImageError
from tests.pictures import make_image

T = TypeVar("T")
pytestmark = pytest.mark.slow  # open_clip is imported, here and in the process

CAPTIONS = ["a red square", "a photograph of a very long train " * 20, "étoile bleue", ""]


def inside(scorer: ClipScorer, work: Callable[[], Awaitable[T]]) -> T:
    async def run() -> T:
        await scorer.start()
        try:
            await scorer.wait_ready()
            return await work()
        finally:
            await scorer.close()

    return asyncio.run(run())


def reference(model: str, picture: bytes) -> list[float]:
    """open_clip's own pipeline, as its README shows it."""
    import open_clip
    import torch

    open_clip.add_model_config(model.partition(":")[0])
    net, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=model.partition(":")[2])
    net.eval()
    with torch.no_grad():
        image = net.encode_image(preprocess(Image.open(io.BytesIO(picture))).unsqueeze(0))
        text = net.encode_text(open_clip.get_tokenizer("tiny-clip")(CAPTIONS))
    cosine = torch.nn.functional.cosine_similarity(image, text)
    return [2.5 * max(value, 0.0) for value in cosine.tolist()]


def test_scores_are_those_of_open_clip_and_a_process_that_ends_is_an_error(tiny_clip: str) -> None:
    pictures = [make_image(50, 40, seed, "PNG" if seed % 2 else "JPEG") for seed in range(6)]
    scorer = ClipScorer(tiny_clip)

    async def score_all() -> list[list[float]]:
        """Together, so that they are scored as batches; one of them is no picture. Then the process is killed."""
        jobs = [scorer.scores(picture, CAPTIONS) for picture in pictures]
        *found, damaged = await asyncio.gather(*jobs, scorer.scores(b"no picture", CAPTIONS), return_exceptions=True)
        assert isinstance(damaged, ImageError)
        os.kill(scorer._process.pid, signal.SIGSTOP)
        waiting = asyncio.ensure_future(scorer.scores(pictures[0], CAPTIONS))
        await asyncio.sleep(0)
        os.kill(scorer._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(EngineDeadError):
            await scorer.scores(pictures[0], CAPTIONS)
        return found  # type: ignore[return-value]

    found = inside(scorer, score_all)
    for picture, scores in zip(pictures, found, strict=True):
        assert scores == pytest.approx(reference(tiny_clip, picture), abs=1e-5)
    assert len({tuple(scores) for scores in found}) == len(pictures) and any(max(scores) > 0.1 for scores in found)
    assert not scorer._process._runtime_dir.exists()


def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    async def run() -> int:
        scorer = ClipScorer(f"no-such-clip:{tmp_path}/x.pt")
        await scorer.start()
        try:
            with pytest.raises(ConfigError, match="knows no architecture 'no-such-clip'"):
                await scorer.wait_ready()
            return await asyncio.wait_for(scorer._process.wait_ended(), 60)
        finally:
            await scorer.close()

    assert asyncio.run(run()) == 1  # and did not abort
    with pytest.raises(ConfigError, match="NAME:WEIGHTS"):
        ClipScorer("ViT-B-32")


def test_weights_that_are_not_there_are_said_once(tiny_clip: str, capfd: pytest.CaptureFixture[str]) -> None:
    scorer = ClipScorer(f"{tiny_clip}.gone")

    async def nothing() -> None:
        pass

    with pytest.raises(ConfigError, match=r"tiny-clip\.pt\.gone"):
        inside(scorer, nothing)
    assert capfd.readouterr().err == ""


def test_without_open_clip_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmv1\[clip\]'"):
        ClipScorer("a:b")
