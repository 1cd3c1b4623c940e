"""Encoded bytes to uint8 patches, or to the pixels of a CLIP model, in a pool process. The only torch file of this room.

The patches, normalised, are bit-identical in bfloat16 to transformers' default (torchvision) Qwen2VLImageProcessor given the
picture as its `load_image` opens it, apart from the two cases named in `media.to_rgb` (transparency, 16-bit grey) and
orientation written only in XMP, or in a PNG's text, both of which browsers ignore too.

Pillow is the reference: it opens every picture and decides what is damaged. Where it would decode a JPEG with nothing to
complain about, simplejpeg gives the same bytes in half the time (no conversion to and from Pillow's own pixel layout).
"""

from __future__ import annotations

import io
import mmap
import time
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image

from mmv1.errors import ImageError
from mmv1.preprocess.crop import CropRules, cropped
from mmv1.preprocess.header import ImageHeader
from mmv1.preprocess.media import ppm_pixels, to_rgb
from mmv1.preprocess.pool_messages import CropJob, DecodeJob

_MAX_SCANS = 100  # of a progressive JPEG, which has about 10: each costs us a pass over all pixels, and its sender 14 bytes
_MAX_DECODER_BYTES = 24  # per pixel, decoding and turning upright; WebP takes most

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB


def prepare_process() -> None:
    """Once per process that decodes, before it forks: every decoder imported, one thread, no limits but the probe's. What
    decoders warn of is the pictures' matter, whose senders could fill the log with it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked against the probed header, whose limits are the server's own


def decode_into(encoded: bytes | memoryview, job: DecodeJob, out: memoryview) -> tuple[float, float]:
    """The whole work of one job: its patches or pixels into `out`, exactly `job.nbytes` writable bytes. Returns the seconds of
    decoding, and of resizing and cutting up. Raises ImageError."""
    started = time.perf_counter()
    try:
        rgb = decode_rgb(encoded, job.header)
        decoded = time.perf_counter()
        if isinstance(job, CropJob):
            np.frombuffer(out, np.uint8)[...] = crop(rgb, job.rules).reshape(-1)
        else:
            resized = resize(rgb, job.resized_height, job.resized_width, job.resample)
            write_patches(resized, job.patch_size, job.merge_size, torch.frombuffer(out, dtype=torch.uint8))
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise ImageError("the image needs more memory to decode than a picture may take", code="image_too_large") from None
    return decoded - started, time.perf_counter() - decoded


def decode_rgb(encoded: bytes | memoryview, header: ImageHeader) -> torch.Tensor:
    """The first frame, upright and RGB: uint8 [height, width, 3]. Raises ImageError, whatever the bytes are, and MemoryError.

    `header` is the probe's: bytes that decode to another size are refused, so nothing is ever written outside a slot.
    """
    if header.format == "PPM":
        pixels = np.frombuffer(ppm_pixels(encoded, header.width, header.height), dtype=np.uint8)
        return torch.from_numpy(pixels.reshape(header.height, header.width, 3).copy())
    try:
        array = _upright(*_decode(encoded, header))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a decoder fed with hostile bytes may raise anything; its words may name addresses: not shown
        if _is_out_of_memory(error) or not _has_room(_MAX_DECODER_BYTES * header.width * header.height):
            raise MemoryError from None
        raise ImageError(f"the {header.format} image is damaged or cut off and cannot be decoded") from None
    if array.shape != (header.height, header.width, 3):
        raise _wrong_size()
    return torch.from_numpy(array)


def _decode(encoded: bytes | memoryview, header: ImageHeader) -> tuple[Pixels, int]:
    """The pixels as they are stored, and the orientation still to be applied. Pillow has applied a TIFF's itself."""
    orientation = 1 if header.format == "TIFF" else header.orientation
    width, height = (header.height, header.width) if orientation >= 5 else (header.width, header.height)
    with Image.open(io.BytesIO(encoded), formats=(header.format,)) as image:
        if image.size != (width, height):
            raise _wrong_size()
        if "progressive" in image.info and bytes(encoded).count(b"\xff\xda") > _MAX_SCANS:
            raise ImageError("the JPEG image has too many scans")
        if header.format == "JPEG" and image.mode in ("RGB", "L"):
            array = _decode_jpeg(encoded, width, height)
            if array is not None:
                return array, orientation
        image.info.pop("xmp", None)  # where Pillow looks for the orientation of a TIFF that has no such tag
        image.load()
        return np.array(to_rgb(image)), orientation


def _decode_jpeg(encoded: bytes | memoryview, width: int, height: int) -> Pixels | None:
    """A YCbCr or grey JPEG, if the decoder has nothing at all to complain about: then Pillow's pixels are the same, from
    another build of the same library. None: ask Pillow."""
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(encoded, strict=True)
        if size == [height, width] and colours in ("YCbCr", "Gray"):
            return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError as error:
        if _is_out_of_memory(error):
            raise
    return None


def _upright(stored: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation (1 to 8) to [height, width, 3]. Pixels move whole, as items of three bytes."""
    if orientation == 1:
        return stored
    pixels = stored.view("V3")[:, :, 0]
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels).view(np.uint8).reshape(*pixels.shape, 3)


def resize(rgb: torch.Tensor, height: int, width: int, resample: str) -> torch.Tensor:
    """uint8 [h, w, 3] to uint8 [height, width, 3], antialiased. Torch's uint8 kernel on a channels-last view is the one that
    torchvision's resize, hence transformers' default backend, runs. Its result is planar in memory."""
    if rgb.shape[:2] == (height, width):
        return rgb
    image = rgb.permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w], channels last in memory
    resized = torch.nn.functional.interpolate(image, size=(height, width), mode=resample, align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0)


def crop(rgb: torch.Tensor, rules: CropRules) -> Pixels:
    """uint8 [h, w, 3] to uint8 [rules.height, rules.width, 3]."""
    return np.array(cropped(Image.fromarray(rgb.numpy()), rules))


def write_patches(rgb: torch.Tensor, patch_size: int, merge_size: int, out: torch.Tensor) -> None:
    """uint8 [height, width, 3], sides multiples of patch_size * merge_size, into `out`, uint8 [num_patches, 3 * patch_size**2].

    Rows in transformers' order: windows of merge_size x merge_size patches, row by row; inside a row channel, y, x. The pixels
    of one channel in one line of one patch are moved as one item, several times faster than one by one.
    """
    height, width, channels = rgb.shape
    windows_down, windows_across = height // (patch_size * merge_size), width // (patch_size * merge_size)
    item = f"V{patch_size}"
    lines = rgb.permute(2, 0, 1).contiguous().numpy().view(item)  # [channel, y, column of patches]
    patches = lines.reshape(channels, windows_down, merge_size, patch_size, windows_across, merge_size)
    ordered = patches.transpose(1, 4, 2, 5, 0, 3)  # [down, across, merge, merge, channel, y]
    out.numpy().view(item).reshape(ordered.shape)[...] = ordered


def _wrong_size() -> ImageError:
    return ImageError("the image is not of the size its header says")


def _is_out_of_memory(error: Exception) -> bool:
    """numpy and Pillow raise MemoryError; torch and simplejpeg have errors of their own, with words for it."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "insufficient memory" in words or "can't allocate memory" in words


def _has_room(nbytes: int) -> bool:
    """Whether so much could be mapped now. Some of Pillow's decoders call a picture broken when they get no memory; where there
    was enough for any, the picture is broken."""
    try:
        mmap.mmap(-1, nbytes).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
