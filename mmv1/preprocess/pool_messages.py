"""What the API server and the preprocess pool say to one another. The answers come from a process that reads hostile bytes,
so they are small, typed, and believed only about the worker they come from."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mmv1.preprocess.crop import CropRules
from mmv1.preprocess.header import ImageHeader


class JobTimes(NamedTuple):
    """Where the time of one job went, in seconds. Of a job that was tried twice, the second try."""

    queue_s: float  # from `submit` to the hand-over to a worker
    decode_s: float
    resize_s: float  # cutting into patches included


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    """Decode the bytes in the payload frame and write what becomes of them at [offset, offset + nbytes) of the slab."""

    job_id: int
    header: ImageHeader
    offset: int
    nbytes: int


class PatchJob(_Job, frozen=True, kw_only=True, tag="patches"):
    """Patches, for a vision tower of a language model."""

    resized_height: int
    resized_width: int
    patch_size: int
    merge_size: int
    resample: str


class CropJob(_Job, frozen=True, kw_only=True, tag="crop"):
    """Lines of pixels, for a CLIP model."""

    rules: CropRules


DecodeJob = PatchJob | CropJob


class WorkerReady(msgspec.Struct, frozen=True, tag="ready"):
    """Worker `worker` waits for jobs. Generation g > 0 took the place of generation g - 1, which is dead."""

    worker: int
    generation: int


class JobDone(msgspec.Struct, frozen=True, tag="done"):
    worker: int
    generation: int
    job_id: int
    decode_s: float
    resize_s: float


class JobFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The picture is at fault; `message` is for whoever sent it."""

    worker: int
    generation: int
    job_id: int
    message: str
    code: str


PoolAnswer = WorkerReady | JobDone | JobFailed


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The pool's command line, as one JSON word."""

    runtime_dir: str
    slab_fd: int
    slab_bytes: int
    num_workers: int
    job_cpu_seconds: float
    worker_memory_bytes: int  # of address space, beyond what is mapped when the worker starts to serve


def worker_socket(worker: int, generation: int) -> str:
    """The name of one worker's job socket: new for each generation, so that no job is ever sent to the dead."""
    return f"w{worker}.{generation}"


ANSWERS_SOCKET = "answers"
