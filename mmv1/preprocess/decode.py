"""Encoded bytes to uint8 patches, in a pool process. The only torch file of this room.

The result, normalised, is bit-identical in bfloat16 to transformers' default (torchvision) Qwen2VLImageProcessor given the
picture as its `load_image` opens it, apart from the two cases named in `media.to_rgb` (transparency, 16-bit grey) and
orientation written only in XMP, which browsers ignore too.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from mmv1.errors import ImageError
from mmv1.preprocess.header import ImageHeader
from mmv1.preprocess.media import ppm_pixels, to_rgb
from mmv1.preprocess.pool_messages import DecodeJob

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def prepare_process() -> None:
    """Once per process that decodes, before it forks: every decoder imported, one thread, no limits but the probe's."""
    torch.set_num_threads(1)
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked against the probed header, whose limits are the server's own


def decode_into(encoded: bytes | memoryview, job: DecodeJob, out: memoryview) -> None:
    """The whole work of one job: its patches into `out`, exactly `job.nbytes` writable bytes. Raises ImageError."""
    rgb = resize(decode_rgb(encoded, job.header), job.resized_height, job.resized_width, job.resample)
    write_patches(rgb, job.patch_size, job.merge_size, torch.frombuffer(out, dtype=torch.uint8))


def decode_rgb(encoded: bytes | memoryview, header: ImageHeader) -> torch.Tensor:
    """The first frame, upright and RGB: uint8 [height, width, 3]. Raises ImageError, whatever the bytes are.

    `header` is the probe's: bytes that decode to another size are refused, so nothing is ever written outside a slot.
    """
    if header.format == "PPM":
        pixels = np.frombuffer(ppm_pixels(encoded, header.width, header.height), dtype=np.uint8)
        return torch.from_numpy(pixels.reshape(header.height, header.width, 3).copy())
    width, height = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    try:
        with Image.open(io.BytesIO(encoded), formats=(header.format,)) as image:
            if image.size != (width, height):
                raise ImageError("the image is not of the size its header says")
            image.load()
            rgb = to_rgb(image)
            if header.orientation != 1:
                rgb = rgb.transpose(_TRANSPOSE[header.orientation])
            array = np.array(rgb)
    except ImageError:
        raise
    except Exception:  # a decoder fed with hostile bytes may raise anything; its words may name addresses, so they stay here
        raise ImageError(f"the {header.format} image is damaged or cut off and cannot be decoded") from None
    if array.shape != (header.height, header.width, 3):
        raise ImageError("the image is not of the size its header says")
    return torch.from_numpy(array)


def resize(rgb: torch.Tensor, height: int, width: int, resample: str) -> torch.Tensor:
    """uint8 [h, w, 3] to uint8 [height, width, 3], antialiased. Torch's uint8 kernel on a channels-last view is the one that
    torchvision's resize, hence transformers' default backend, runs."""
    if rgb.shape[:2] == (height, width):
        return rgb
    image = rgb.permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w], channels last in memory
    resized = torch.nn.functional.interpolate(image, size=(height, width), mode=resample, align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0)


def write_patches(rgb: torch.Tensor, patch_size: int, merge_size: int, out: torch.Tensor) -> None:
    """uint8 [height, width, 3], sides multiples of patch_size * merge_size, into `out`, uint8 [num_patches, 3 * patch_size**2].

    Rows in transformers' order: windows of merge_size x merge_size patches, row by row; inside a row channel, y, x.
    """
    height, width, channels = rgb.shape
    windows_down, windows_across = height // (patch_size * merge_size), width // (patch_size * merge_size)
    patches = rgb.reshape(windows_down, merge_size, patch_size, windows_across, merge_size, patch_size, channels)
    ordered = patches.permute(0, 3, 1, 4, 6, 2, 5)  # [down, across, merge, merge, channel, y, x]
    out.view(ordered.shape).copy_(ordered)
