"""The process of a CLIP model: `python -m mmv1.embedding.clip_process SETTINGS`, started by client.py.

What has come meanwhile is one batch, pictures together and texts together. The process ends when its standard input does, that
is with whoever started it; and when the model fails, for a device may be left in any state: then another is started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mmv1.embedding.messages import (
    ANSWERS_SOCKET,
    JOBS_SOCKET,
    ClipJob,
    ClipReady,
    ClipSettings,
    Embedded,
    EmbedPicture,
    NotEmbedded,
)
from mmv1.errors import RequestError
from mmv1.log import configure_logging, logger
from mmv1.preprocess.slab import map_slab
from mmv1.wire import Receiver, Sender, ipc_address

if TYPE_CHECKING:
    from mmv1.embedding.clip_model import ClipModel

_MAX_BATCH = 64  # pictures and texts

Received = tuple[ClipJob, memoryview | None]


def _batches(jobs: Receiver[ClipJob]) -> Iterator[list[Received]]:
    """What has come, at least one."""
    while True:
        batch: list[Received] = []
        timeout_s = None
        while len(batch) < _MAX_BATCH and (received := jobs.recv_with_payload(timeout_s)) is not None:
            batch.append(received)
            timeout_s = 0.0
        yield batch


def _embed(model: ClipModel, slab: memoryview, batch: Sequence[Received], answers: Sender) -> None:
    """Answers every job of the batch."""
    pictures: dict[int, Any] = {}
    texts: dict[int, Any] = {}
    num_tokens: dict[int, int] = {}
    for job, payload in batch:
        try:
            if not isinstance(job, EmbedPicture):
                texts[job.job_id], num_tokens[job.job_id] = model.tokens(job.text, truncate=job.truncate)
            elif job.offset is None:
                pictures[job.job_id] = model.pixels(bytes(payload or b""))
            else:
                pictures[job.job_id] = model.pixels_at(slab, job.offset)
        except RequestError as error:
            answers.send(NotEmbedded(job.job_id, error.message, error.code))
        except Exception:  # a tokenizer may raise anything; others' jobs are not to suffer for it
            logger.exception("An input could not be prepared")
            answers.send(NotEmbedded(job.job_id, "the input cannot be read", "invalid_value"))
    works: tuple[tuple[Callable[[list[Any]], list[bytes]], dict[int, Any]], ...] = (
        (model.encode_pictures, pictures),
        (model.encode_texts, texts),
    )
    for encode, inputs in works:
        for job_id, values in zip(inputs, encode(list(inputs.values())) if inputs else (), strict=True):
            answers.send(Embedded(job_id, values, num_tokens.get(job_id, 0)))


def _end_with_parent(runtime_dir: str) -> None:
    """Standard input ends when the parent does, however that happened."""
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: its lock, held by a daemon thread, is fatal when Python ends
        pass
    shutil.rmtree(runtime_dir, ignore_errors=True)
    os._exit(0)


def main() -> int:
    settings = msgspec.json.decode(sys.argv[1], type=ClipSettings)
    configure_logging("clip")
    logging.getLogger().addHandler(logging.NullHandler())  # else open_clip makes one that says everything, much of it again
    with contextlib.suppress(OSError):
        os.nice(settings.niceness)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a service's processes at once: the parent decides
    threading.Thread(target=_end_with_parent, args=(settings.runtime_dir,), name="parent", daemon=True).start()
    answers = Sender(ipc_address(settings.runtime_dir, ANSWERS_SOCKET))
    try:
        from mmv1.embedding.clip_model import ClipModel

        model = ClipModel(settings.model)
    except Exception as error:  # a missing file, an unknown tag, weights of another architecture: open_clip raises all kinds
        answers.send(ClipReady(error=str(error).splitlines()[0] if str(error) else type(error).__name__))
        answers.close(linger_s=5.0)
        return 1
    slab = memoryview(b"" if settings.slab_fd is None else map_slab(settings.slab_fd, settings.slab_bytes))
    jobs: Receiver[ClipJob] = Receiver(ipc_address(settings.runtime_dir, JOBS_SOCKET), ClipJob)
    logger.info("CLIP model %s loaded", settings.model)
    answers.send(
        ClipReady(rules=model.rules, dimensions=model.dimensions, context_length=model.context_length, device=model.device)
    )
    for batch in _batches(jobs):
        _embed(model, slab, batch, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
