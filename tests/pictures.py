"""Pictures for tests: any size, any format, with enough structure that no two look alike to a model."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw


def make_pil(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture of a colour gradient, shapes and grain; the same for the same arguments."""
    rng = np.random.default_rng([width, height, seed])
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for shape in ("rectangle", "ellipse", "line") * 3:
        left, right = sorted(rng.integers(0, width, 2).tolist())
        top, bottom = sorted(rng.integers(0, height, 2).tolist())
        getattr(draw, shape)((left, top, right, bottom), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG") -> bytes:
    """The bytes of a file of this picture."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def make_image(width: int, height: int, seed: int = 0, format: str = "JPEG") -> bytes:
    """An encoded picture: `make_pil`, as a file's bytes."""
    return encode(make_pil(width, height, seed), format)


def decode(encoded: bytes) -> Image.Image:
    """The RGB picture in a file's bytes: what the reference sees of a JPEG, losses included."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def data_url(encoded: bytes, format: str = "JPEG") -> str:
    """The file as a `data:` URL."""
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded).decode()}"
