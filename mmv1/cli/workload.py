"""What `mmv1 bench` asks: random words and random pictures, the same again for the same seed.

A picture is smooth fields of colour with some texture, so that it costs about what a photograph costs to send and to decode.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pybase64
from PIL import Image

_COMMON_WORDS = """
    a about after again all also an and any are as at back because been before but by can come could day do down each even
    find first for from get give go good great had hand has have he her here him his home how I if in into is it its just
    know large last left life like line little long look made make man many may me more most must my name new no not now of
    off old on one only or other our out over own part people place right said same see she show side small so some such
    take tell than that the their them then there these they thing think this time to two up us use very want was water way
    we well were what when where which white who will with word work world would write year you your
"""
_WORDS = _COMMON_WORDS.split()


class Prompt(NamedTuple):
    """`pictures`: data: URLs."""

    text: str
    pictures: list[str]

    def messages(self) -> list[dict[str, object]]:
        """OpenAI's, the pictures before the text."""
        images = [{"type": "image_url", "image_url": {"url": url}} for url in self.pictures]
        return [{"role": "user", "content": [*images, {"type": "text", "text": self.text}]}]


def random_words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(_WORDS, count))


def random_prompts(
    rng: np.random.Generator, *, num_words: int, num_images: int, size: tuple[int, int], image_reuse: float
) -> Iterator[Prompt]:
    """Without end. `size`: width and height in pixels. A picture is with the probability `image_reuse` one that was there before,
    each as likely as any other."""
    pictures: list[str] = []
    while True:
        chosen = []
        for _ in range(num_images):
            if pictures and rng.random() < image_reuse:
                chosen.append(pictures[rng.integers(len(pictures))])
                continue
            chosen.append("data:image/jpeg;base64," + pybase64.b64encode(_jpeg(rng, *size)).decode())
            if image_reuse:
                pictures.append(chosen[-1])
        yield Prompt(random_words(rng, num_words), chosen)


def _jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    fields = _noise(rng, 12, 12).resize((width, height), Image.Resampling.BICUBIC)
    texture = _noise(rng, height // 4 + 1, width // 4 + 1).resize((width, height), Image.Resampling.BILINEAR)
    encoded = io.BytesIO()
    Image.blend(fields, texture, 0.15).save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def _noise(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
