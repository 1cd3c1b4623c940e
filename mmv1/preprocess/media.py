"""A picture as it comes: bytes, URL, path or PIL image, made into encoded bytes with a probed header.

Also the colour policy (`to_rgb`), the one rule by which pictures of every mode become RGB, here and in the pool's decoder.
Knows nothing of models, fetching or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from PIL import Image, ImageOps

from mmv1.errors import ImageError
from mmv1.preprocess.header import ImageHeader, probe_header

# The type says where a picture may come from: bytes are an encoded file, a str is always a URL (data:, http:, https:, file:), a
# Path is a local file. Only the offline API makes Paths and PIL images; nothing that came over HTTP ever becomes one.
ImageSource = bytes | str | Path | Image.Image

DECODE_POLICY = "rgb/white-background/exif/first-frame/1"  # enters mm_hash: changes whenever `to_rgb` or the decoder does

MAX_ASPECT_RATIO = 200


class EncodedImage(msgspec.Struct, frozen=True, array_like=True):
    """Bytes the decoder can read, and their header. Format PPM comes from our own process only (`encode_pil`)."""

    data: bytes
    header: ImageHeader


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may be, as it comes. Pixels and sides are of the picture itself, before any resize."""

    max_encoded_bytes: int
    max_pixels: int
    max_side: int
    extra_formats: tuple[str, ...] = ()  # "BMP", "TIFF": what is accepted besides JPEG, PNG, WebP and GIF

    def check_encoded(self, num_bytes: int) -> None:
        if num_bytes > self.max_encoded_bytes:
            limit_mb = self.max_encoded_bytes / (1 << 20)
            raise ImageError(f"the image has more than the {limit_mb:.0f} MiB allowed", code="image_too_large")

    def check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            message = f"the image has {width} x {height} pixels; at most {self.max_pixels} in all are allowed"
            raise ImageError(message, code="image_too_large")
        if max(width, height) > self.max_side:
            message = f"the image has {width} x {height} pixels; no side may have more than {self.max_side}"
            raise ImageError(message, code="image_too_large")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            message = f"the image has {width} x {height} pixels; its sides may differ by a factor of {MAX_ASPECT_RATIO} at most"
            raise ImageError(message)


def accept_bytes(data: bytes, limits: ImageLimits) -> EncodedImage:
    """Encoded bytes from anywhere, probed and within the limits. Raises ImageError."""
    limits.check_encoded(len(data))
    header = probe_header(data, limits.extra_formats)
    limits.check_size(header.width, header.height)
    return EncodedImage(data, header)


def encode_pil(image: Image.Image, limits: ImageLimits) -> EncodedImage:
    """A PIL image, turned upright and made RGB by the decoder's own rules, as a raw PPM in memory. Raises ImageError."""
    limits.check_size(*image.size)
    try:
        rgb = to_rgb(ImageOps.exif_transpose(image))
        pixels = rgb.tobytes()
    except (OSError, ValueError, SyntaxError):
        raise ImageError(f"a PIL image of mode {image.mode!r} cannot be converted to RGB") from None
    width, height = rgb.size
    return EncodedImage(b"P6\n%d %d\n255\n" % (width, height) + pixels, ImageHeader("PPM", width, height))


def ppm_pixels(encoded: bytes | memoryview, width: int, height: int) -> memoryview:
    """The pixels of a PPM made by `encode_pil`: height x width x 3 bytes, row by row, not copied. Raises ImageError."""
    head = b"P6\n%d %d\n255\n" % (width, height)
    view = memoryview(encoded)
    if bytes(view[: len(head)]) != head or len(view) != len(head) + 3 * width * height:
        raise ImageError("the image's pixels are incomplete")
    return view[len(head) :]


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB. Equal to Pillow's convert("RGB"), which transformers' processors use, but for two cases:

    - transparency is laid on white. Dropping it, as convert("RGB") does, shows whatever colour lies under transparent
      pixels, mostly black. (Opaque alpha gives the same either way.)
    - 16-bit grey keeps its high byte, as 16-bit colour does, where convert("RGB") turns all above 255 of 65535 white.
    """
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGB", rgba.size, (255, 255, 255))
        background.paste(rgba, mask=rgba.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")
