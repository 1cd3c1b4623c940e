"""The header probe: format, size and EXIF orientation of an encoded picture, in microseconds and without decoding it.

Own parsers of the few bytes that matter, in the API server's process, instead of Pillow's lazy open: Pillow inflates text
chunks, allocates a WebP's whole canvas, and decodes a PNG to look for EXIF data behind its pixels. The decoder later checks
that the picture really has the probed size, so a header that lies costs its sender an error and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from typing import Literal

import msgspec

from mmv1.errors import ImageError

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]

_ACCEPTED = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF"}  # always; and how a sentence spells them
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
_MAX_SEGMENTS = 20_000  # looked at, some ten milliseconds; real pictures have a few thousand at most
_MAX_TAGS = 4096  # of a TIFF directory; real ones have a few dozen
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_ORIENTATION = 0x0100, 0x0101, 0x0112
_TIFF_TYPES = {3: "H", 4: "I"}  # of the numbers asked for here


class ImageHeader(msgspec.Struct, frozen=True, array_like=True):
    """`width` and `height` are in pixels, as displayed: orientations 5 to 8 have swapped them already."""

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1  # EXIF: 1 is upright


def probe_header(data: bytes, extra_formats: Collection[str] = ()) -> ImageHeader:
    """The header of a JPEG, PNG, WebP or GIF, or of one of `extra_formats` ("BMP", "TIFF"). Raises ImageError
    (unsupported_image_format, invalid_image)."""
    if not data:
        raise ImageError("the image is empty")
    name = _format(data)
    if name is None or name not in (*_ACCEPTED, *extra_formats):
        *names, last = (*_ACCEPTED.values(), *extra_formats)
        raise ImageError(f"not a {', '.join(names)} or {last} image", code="unsupported_image_format")
    try:
        width, height, orientation = _PARSERS[name](memoryview(data))
    except (struct.error, LookupError, ValueError):
        raise ImageError(f"the {name} image's header is damaged or cut off") from None
    if width < 1 or height < 1:
        raise ImageError(f"the {name} image has no pixels")
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(name, width, height, orientation)


def _format(data: bytes) -> ImageFormat | None:
    """From the first bytes alone."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    return None


def _jpeg(data: memoryview) -> tuple[int, int, int]:
    """Walk the segments up to the frame header; EXIF data stands before it. A second segment of it continues the first."""
    position, orientation = 2, None
    for _ in range(_MAX_SEGMENTS):
        if data[position] != 0xFF:
            raise ValueError("no marker")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _JPEG_BARE_MARKERS:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if length < 2 or marker in (0xD9, 0xDA):
            raise ValueError("no frame header")
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height, orientation or 1
        if marker == 0xE1 and orientation is None and bytes(data[position + 4 : position + 10]) == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    raise ValueError("too many segments")


def _png(data: memoryview) -> tuple[int, int, int]:
    """IHDR, then the chunks in search of eXIf, which may stand before or behind the pixels."""
    if bytes(data[12:16]) != b"IHDR":
        raise ValueError("no IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    position = 8
    for _ in range(_MAX_SEGMENTS):
        if position + 8 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, position)
        kind = bytes(data[position + 4 : position + 8])
        if kind == b"eXIf":
            return width, height, _exif_orientation(data[position + 8 : position + 8 + length])
        if kind == b"IEND":
            break
        position += 12 + length
    return width, height, 1


def _webp(data: memoryview) -> tuple[int, int, int]:
    """The canvas of an extended file (VP8X), else the frame's own size (VP8 or VP8L)."""
    kind = bytes(data[12:16])
    if kind == b"VP8 ":
        if bytes(data[23:26]) != b"\x9d\x01\x2a":
            raise ValueError("no key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, 1
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise ValueError("no lossless signature")
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1, 1
    if kind != b"VP8X" or len(data) < 30:
        raise ValueError("no extended header")
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    return width, height, _webp_orientation(data) if data[20] & 0x08 else 1


def _webp_orientation(data: memoryview) -> int:
    position = 12
    for _ in range(_MAX_SEGMENTS):
        if position + 8 > len(data):
            break
        kind = bytes(data[position : position + 4])
        (length,) = struct.unpack_from("<I", data, position + 4)
        if kind == b"EXIF":
            return _exif_orientation(data[position + 8 : position + 8 + length])
        position += 8 + length + (length & 1)
    return 1


def _gif(data: memoryview) -> tuple[int, int, int]:
    """The logical screen, or the first frame's far corner where that lies outside it (as decoders enlarge it)."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    is_inside = False  # an extension, made of blocks behind their lengths, up to one of length 0
    for _ in range(_MAX_SEGMENTS):
        first = data[position]
        if is_inside:
            position += 1 + first
            is_inside = first != 0
        elif first == 0x21:
            position += 2
            is_inside = True
        elif first == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return max(width, left + frame_width), max(height, top + frame_height), 1
        else:
            raise ValueError("no frame")
    raise ValueError("too many blocks")


def _bmp(data: memoryview) -> tuple[int, int, int]:
    """The older header has sizes of 16 bits; in the others a negative height says that the first line is the top one."""
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    elif header_bytes in (40, 52, 56, 64, 108, 124):
        width, height = struct.unpack_from("<Ii", data, 18)
    else:
        raise ValueError("no header of a known kind")
    return width, abs(height), 1


def _tiff(data: memoryview) -> tuple[int, int, int]:
    """The first directory, that is the first page."""
    tags = _tiff_tags(data, (_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_ORIENTATION))
    return tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT], _orientation(tags)


def _exif_orientation(tiff: memoryview) -> int:
    """The orientation tag of the first directory; 1 where it is missing, damaged or out of range."""
    if bytes(tiff[:6]) == b"Exif\0\0":
        tiff = tiff[6:]
    try:
        return _orientation(_tiff_tags(tiff, (_TIFF_ORIENTATION,)))
    except (struct.error, LookupError, ValueError):
        return 1


def _orientation(tags: dict[int, int]) -> int:
    value = tags.get(_TIFF_ORIENTATION, 1)
    return value if 1 <= value <= 8 else 1


def _tiff_tags(tiff: memoryview, wanted: Collection[int]) -> dict[int, int]:
    """The numbers of the first directory's tags; of a tag that is there twice the last, as Pillow has it."""
    order = {b"II": "<", b"MM": ">"}[bytes(tiff[:2])]
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    if count > _MAX_TAGS:
        raise ValueError("too many tags")
    tags: dict[int, int] = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag in wanted and kind in _TIFF_TYPES:
            (tags[tag],) = struct.unpack_from(order + _TIFF_TYPES[kind], tiff, entry + 8)
    return tags


_PARSERS: dict[str, Callable[[memoryview], tuple[int, int, int]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
}
