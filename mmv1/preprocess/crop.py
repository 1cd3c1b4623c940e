"""From a picture of any size to the one size that a CLIP model reads, as open_clip's transform has it: resized, then cut out of
the middle or padded. Pillow resizes, as there, so the pixels are the same; to normalise them is the model's matter.

Sizes are known without decoding. Torch-free.
"""

from __future__ import annotations

import json
from typing import Literal

import msgspec
from PIL import Image

from mmv1.preprocess.layout import ImagePlace, Resample

ResizeMode = Literal["shortest", "longest", "squash"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class CropRules(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides a picture's pixels, beside the picture. In the slab it is uint8 [height, width, 3], RGB.

    `resize_mode`: the picture covers height x width and what juts out is cut off (shortest), or lies within and the rest has the
    grey `fill_color` (longest), or is stretched (squash).
    """

    height: int
    width: int
    resize_mode: ResizeMode = "shortest"
    resample: Resample = "bicubic"
    fill_color: int = 0

    def place(self) -> ImagePlace:
        """The same for every picture: one patch a pixel, and no tokens, for it is in no prompt."""
        grid = (1, self.height, self.width)
        return ImagePlace(self.height, self.width, grid, num_tokens=0, nbytes=3 * self.height * self.width)

    def fingerprint(self) -> str:
        """Enters mm_hash."""
        return json.dumps({"family": "clip/1", **msgspec.structs.asdict(self)})

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before it is cut or padded. The long side is rounded down where both sides are to be equal, else to
        the nearest."""
        if self.resize_mode == "squash":
            return self.width, self.height
        if self.resize_mode == "shortest" and self.height == self.width:
            side = self.width
            return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        ratios = (width / self.width, height / self.height)
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))


def cropped(image: Image.Image, rules: CropRules) -> Image.Image:
    """An RGB picture made rules.width x rules.height."""
    size = rules.resized_size(*image.size)
    if size != image.size:
        image = image.resize(size, _FILTERS[rules.resample])
    if size == (rules.width, rules.height):
        return image
    canvas = Image.new("RGB", (rules.width, rules.height), (rules.fill_color,) * 3)
    canvas.paste(image, (_start(size[0], rules.width), _start(size[1], rules.height)))
    return canvas


def _start(length: int, room: int) -> int:
    """Where `length` pixels begin in the middle of `room`; negative where they jut out. An odd one rounds as in torchvision."""
    return (room - length) // 2 if length < room else -round((length - room) / 2)
