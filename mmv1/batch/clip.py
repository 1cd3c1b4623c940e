"""How well a caption fits its picture, by a CLIP model of open_clip: CLIPScore, 2.5 * max(cos(picture, caption), 0), without
reference captions (Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning").

The model runs in a process of its own (mmv1.embedding), which takes whatever has come meanwhile as one batch. So scoring goes on
beside captioning, and this process needs no torch. CLIP reads no more of a caption than its context holds, 77 tokens for most
models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from operator import mul

from mmv1.embedding.client import ClipProcess
from mmv1.embedding.messages import Embedded
from mmv1.errors import ImageError

_WEIGHT = 2.5  # of the cosine, in the paper
_NICENESS = 5  # on a CPU, captions go before scores


class ClipScorer:
    """`start` before, `close` after; one event loop."""

    def __init__(self, model: str) -> None:
        """`model`: see ClipModel. Raises ConfigError, also without open_clip."""
        self._process = ClipProcess(model, flag="--clip-model", niceness=_NICENESS)

    async def start(self) -> None:
        """Start the process; the model is loaded meanwhile."""
        await self._process.start()

    async def wait_ready(self) -> None:
        """Returns when the model is loaded. Raises ConfigError when it cannot be."""
        await self._process.wait_ready()

    async def scores(self, picture: bytes, captions: Sequence[str]) -> list[float]:
        """One score a caption, 0 to 2.5. Raises ImageError when the picture cannot be read, EmbedderDeadError when the process
        has ended."""
        try:
            image, *texts = await asyncio.gather(
                self._process.embed_picture(picture),
                *(self._process.embed_text(caption, truncate=True) for caption in captions),
            )
        except ImageError as error:
            raise ImageError(f"the picture cannot be scored: {error.message}", code=error.code) from None
        return [_WEIGHT * max(_cosine(image, text), 0.0) for text in texts]

    async def close(self) -> None:
        await self._process.close()


def _cosine(first: Embedded, second: Embedded) -> float:
    """Of embeddings of length 1."""
    return sum(map(mul, *(memoryview(each.values).cast("f") for each in (first, second))))
