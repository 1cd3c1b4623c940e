"""How well a caption fits its picture, by a CLIP model of open_clip: CLIPScore, 2.5 * max(cos(picture, caption), 0), without
reference captions (Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning").

The model runs in a process of its own, `python -m mmv1.batch.clip`, which scores whatever has come meanwhile as one batch. So
scoring goes on beside captioning, and this process needs no torch. CLIP reads no more of a caption than its context holds, 77
tokens for most models.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mmv1 import child
from mmv1.errors import ConfigError, EngineDeadError, ImageError
from mmv1.log import configure_logging, logger
from mmv1.wire import AsyncReceiver, AsyncSender, Receiver, Sender, ipc_address, new_runtime_dir

DEFAULT_MODEL = "ViT-B-32:laion2b_s34b_b79k"
_WEIGHT = 2.5  # of the cosine, in the paper
_MAX_BATCH = 64  # pictures
_NICENESS = 5  # on a CPU, captions go before scores
_JOBS, _SCORES = "clip-jobs", "clip-scores"  # sockets


class ScoreJob(msgspec.Struct, frozen=True):
    """The picture's bytes are the payload."""

    job_id: int
    captions: list[str]


class Scores(msgspec.Struct, frozen=True, tag="scores"):
    """`error`: why there are none."""

    job_id: int
    scores: list[float]
    error: str | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """`error`: why the model cannot be loaded, in words."""

    error: str | None = None


class ClipScorer:
    """The process, from outside. `start` before, `close` after; one event loop."""

    def __init__(self, model: str) -> None:
        """`model`: NAME:TAG, as open_clip lists them, or NAME:PATH of weights; NAME may be the path of a JSON file with an
        architecture. Raises ConfigError, also without open_clip."""
        if importlib.util.find_spec("open_clip") is None:
            raise ConfigError("ranking needs open_clip: install it with `pip install 'mmv1[clip]'`")
        if not all(model.partition(":")):
            raise ConfigError(f"--clip-model {model} must have the form NAME:WEIGHTS, such as {DEFAULT_MODEL}")
        self._model = model
        self._job_ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[Scores]] = {}
        self._has_ended = False

    async def start(self) -> None:
        """Start the process; the model is loaded meanwhile."""
        self._runtime_dir = new_runtime_dir()
        self._jobs = AsyncSender(ipc_address(self._runtime_dir, _JOBS), bind=True)
        self._answers: AsyncReceiver[Ready | Scores] = AsyncReceiver(
            ipc_address(self._runtime_dir, _SCORES), Ready | Scores, bind=True
        )
        self._process = await child.start(
            "mmv1.batch.clip", str(self._runtime_dir), self._model, pass_fds=(), env={"OMP_WAIT_POLICY": "PASSIVE"}
        )
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    async def wait_ready(self) -> None:
        """Returns when the model is loaded. Raises ConfigError when it cannot be."""
        ready = await self._ready
        if ready.error is not None:
            raise ConfigError(f"--clip-model {self._model} cannot be loaded: {ready.error}")

    async def scores(self, picture: bytes, captions: Sequence[str]) -> list[float]:
        """One score a caption, 0 to 2.5. Raises ImageError when the picture cannot be read, EngineDeadError when the process
        has ended."""
        if self._has_ended:
            raise EngineDeadError("the process that scores captions has ended")
        job = ScoreJob(next(self._job_ids), list(captions))
        answer = self._waiting[job.job_id] = asyncio.get_running_loop().create_future()
        try:
            await self._jobs.send(job, picture)
            scores = await answer
        finally:
            self._waiting.pop(job.job_id, None)
        if scores.error is not None:
            raise ImageError(f"the picture cannot be scored: {scores.error}")
        return scores.scores

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await child.stop(self._process)
        self._jobs.close()
        self._answers.close()
        shutil.rmtree(self._runtime_dir, ignore_errors=True)

    async def _receive(self) -> None:
        while True:
            answer = await self._answers.recv()
            if isinstance(answer, Ready):
                self._ready.set_result(answer)
            elif (waiting := self._waiting.get(answer.job_id)) is not None and not waiting.done():
                waiting.set_result(answer)

    async def _watch(self) -> None:
        await self._process.wait()
        self._has_ended = True
        if not self._ready.done():
            self._ready.set_result(Ready("its process ended"))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EngineDeadError("the process that scores captions has ended"))


# ---- in the process ----


class _Model:
    """A CLIP model, its tokenizer and its picture transform, as open_clip gives them."""

    def __init__(self, model: str) -> None:
        import open_clip
        import torch

        name, _, pretrained = model.partition(":")
        if name.endswith(".json"):
            open_clip.add_model_config(name)
            name = Path(name).stem
        if name not in open_clip.list_models():
            raise ValueError(f"open_clip knows no architecture '{name}'")
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model, _, self._transform = open_clip.create_model_and_transforms(name, pretrained, device=self._device)
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(name)

    def read(self, picture: bytes) -> Any:
        """As the engine sees it: upright, transparency on white. Raises OSError and others for a damaged picture."""
        from PIL import Image, ImageOps

        from mmv1.preprocess.media import to_rgb

        return self._transform(to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(picture)))))

    def score(self, pixels: Sequence[Any], captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores of each picture's captions."""
        torch = self._torch
        counts = [len(each) for each in captions]
        with torch.inference_mode():
            images = self._model.encode_image(torch.stack(list(pixels)).to(self._device), normalize=True)
            tokens = self._tokenizer(list(itertools.chain.from_iterable(captions))).to(self._device)
            texts = self._model.encode_text(tokens, normalize=True)
            of_text = images.repeat_interleave(torch.tensor(counts, device=self._device), dim=0)
            scores = _WEIGHT * (of_text * texts).sum(dim=-1).clamp(min=0)
        return [part.tolist() for part in scores.float().cpu().split(counts)]


def _batches(jobs: Receiver[ScoreJob]) -> Iterator[list[tuple[ScoreJob, bytes]]]:
    """What has come, at least one."""
    while True:
        batch: list[tuple[ScoreJob, bytes]] = []
        timeout_s = None
        while len(batch) < _MAX_BATCH and (received := jobs.recv_with_payload(timeout_s)) is not None:
            job, payload = received
            batch.append((job, bytes(payload or b"")))
            timeout_s = 0.0
        yield batch


def _score_batch(model: _Model, batch: Sequence[tuple[ScoreJob, bytes]], answers: Sender) -> None:
    """Answers every job of the batch."""
    jobs, pixels = [], []
    for job, picture in batch:
        try:
            pixels.append(model.read(picture))
            jobs.append(job)
        except Exception as error:  # Pillow raises all kinds for damaged pictures
            answers.send(Scores(job.job_id, [], type(error).__name__))
    if jobs:
        for job, scores in zip(jobs, model.score(pixels, [job.captions for job in jobs]), strict=True):
            answers.send(Scores(job.job_id, scores))


def _end_with_parent(runtime_dir: str) -> None:
    """Standard input ends when the parent does, however that happened."""
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: its lock, held by a daemon thread, is fatal when Python ends
        pass
    shutil.rmtree(runtime_dir, ignore_errors=True)
    os._exit(0)


def main() -> int:
    runtime_dir, name = sys.argv[1:]
    configure_logging("clip")
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a service's processes at once: the parent decides
    threading.Thread(target=_end_with_parent, args=(runtime_dir,), name="parent", daemon=True).start()
    answers = Sender(ipc_address(runtime_dir, _SCORES))
    try:
        model = _Model(name)
    except Exception as error:  # a missing file, an unknown tag, weights of another architecture: open_clip raises all kinds
        answers.send(Ready(str(error).splitlines()[0] if str(error) else type(error).__name__))
        answers.close(linger_s=5.0)
        return 1
    jobs: Receiver[ScoreJob] = Receiver(ipc_address(runtime_dir, _JOBS), ScoreJob)
    answers.send(Ready())
    logger.info("CLIP model %s loaded", name)
    for batch in _batches(jobs):
        _score_batch(model, batch, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
