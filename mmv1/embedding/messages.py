"""What a process that embeds (clip_process.py) and whoever started it (client.py) say to one another."""

from __future__ import annotations

import msgspec

from mmv1.preprocess.crop import CropRules


class ClipSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The process's command line, as one JSON word. `model`: NAME:WEIGHTS. `slab_fd` None: there is no slab."""

    runtime_dir: str
    model: str
    slab_fd: int | None
    slab_bytes: int
    niceness: int


class EmbedPicture(msgspec.Struct, frozen=True, tag="picture"):
    """Its pixels lie at `offset` of the slab, by the model's rules; None: the payload is the picture as it came, encoded."""

    job_id: int
    offset: int | None = None


class EmbedText(msgspec.Struct, frozen=True, tag="text"):
    """`truncate`: what is beyond the model's context is left out; otherwise such a text is refused."""

    job_id: int
    text: str
    truncate: bool


ClipJob = EmbedPicture | EmbedText


class ClipReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The first message: the model is loaded. `error`: why it cannot be, in words."""

    rules: CropRules = CropRules(height=1, width=1)
    dimensions: int = 0
    context_length: int = 0
    device: str = ""
    error: str | None = None


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """`values`: float32, little-endian, of length 1 in the Euclidean norm. `num_tokens`: 0 for a picture."""

    job_id: int
    values: bytes
    num_tokens: int = 0


class NotEmbedded(msgspec.Struct, frozen=True, tag="refused"):
    """The picture or the text is at fault; `message` is for whoever sent it."""

    job_id: int
    message: str
    code: str


ClipAnswer = ClipReady | Embedded | NotEmbedded

JOBS_SOCKET, ANSWERS_SOCKET = "clip-jobs", "clip-answers"
