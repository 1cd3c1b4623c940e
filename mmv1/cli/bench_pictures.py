"""Random pictures for `mmv1 bench`: smooth fields of colour with some texture, so that one costs about what a photograph costs to
send and to decode."""

from __future__ import annotations

import io
from itertools import count

import numpy as np
import pybase64
from PIL import Image

from mmv1.cli.workload import PictureSize


class Pictures:
    """Random pictures, no two alike, but for those of a pool of `pool_size`: one of these comes with the probability `reuse`.
    All the same again for the same seed."""

    def __init__(self, seed: int, *, pool_size: int = 1, reuse: float = 0.0) -> None:
        self._seed = seed
        self._pool_size = pool_size
        self._reuse = reuse
        self._pool: dict[tuple[int, PictureSize], str] = {}
        self._serials = count()

    def next(self, rng: np.random.Generator, size: PictureSize) -> str:
        """A data: URL."""
        if self._reuse and rng.random() < self._reuse:
            key = (int(rng.integers(self._pool_size)), size)
            if key not in self._pool:
                self._pool[key] = self._make(0, key[0], size)
            return self._pool[key]
        return self._make(1, next(self._serials), size)

    def _make(self, kind: int, serial: int, size: PictureSize) -> str:
        encoded = _jpeg(np.random.default_rng([self._seed, kind, serial]), *size)
        return "data:image/jpeg;base64," + pybase64.b64encode(encoded).decode()


def _jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    fields = _noise(rng, 12, 12).resize((width, height), Image.Resampling.BICUBIC)
    texture = _noise(rng, height // 4 + 1, width // 4 + 1).resize((width, height), Image.Resampling.BILINEAR)
    encoded = io.BytesIO()
    Image.blend(fields, texture, 0.15).save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def _noise(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
