"""The header probe agrees with Pillow on real files, and survives any bytes."""

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmv1.errors import ImageError
from mmv1.preprocess.header import probe_header

SIZES = [(1, 1), (2, 3), (3, 2), (28, 28), (257, 129), (1000, 7), (640, 480)]


def save(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def orientation_exif(value):
    exif = Image.Exif()
    exif[0x0112] = value
    exif[0x010F] = "a camera"
    return exif


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {}),
    ],
)
def test_size_and_format(size, format, mode, options):
    header = probe_header(save(Image.new(mode, size), format, **options))
    assert (header.format, header.width, header.height, header.orientation) == (format, *size, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientation_as_pillow_sees_it(format, orientation):
    data = save(Image.new("RGB", (40, 30)), format, exif=orientation_exif(orientation))
    header = probe_header(data)
    assert header.orientation == orientation
    assert (header.width, header.height) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_png_orientation_behind_the_pixels():
    data = save(Image.new("RGB", (40, 30)), "PNG")
    end = data.rindex(b"IEND") - 4
    exif = orientation_exif(6).tobytes().removeprefix(b"Exif\0\0")
    data = data[:end] + png_chunk(b"eXIf", exif) + data[end:]
    assert probe_header(data).orientation == 6
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (30, 40)


def test_gif_frame_larger_than_its_screen():
    data = bytearray(save(Image.new("P", (50, 20)), "GIF"))
    struct.pack_into("<HH", data, 6, 10, 10)  # the logical screen
    header = probe_header(bytes(data))
    assert (header.width, header.height) == Image.open(io.BytesIO(data)).size == (50, 20)


def test_animated_files_have_the_size_of_the_first_frame():
    frames = [Image.new("RGB", (60, 40), color) for color in ("red", "green", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = save(frames[0], format, save_all=True, append_images=frames[1:])
        assert (probe_header(data).width, probe_header(data).height) == (60, 40)


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg></svg>", b"BM" + bytes(100), b"II*\0" + bytes(100), b"P6\n1 1\n255\nabc"])
def test_other_bytes_are_refused(data):
    with pytest.raises(ImageError) as refusal:
        probe_header(data)
    assert refusal.value.code == ("unsupported_image_format" if data else "invalid_image")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_and_damaged_headers_never_raise_anything_else(format):
    data = save(Image.new("RGB", (64, 48)), format, **({} if format == "GIF" else {"exif": orientation_exif(6)}))
    for end in range(len(data)):
        try:
            probe_header(data[:end])
        except ImageError:
            pass


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8X", b"GIF89a"]),
    rest=st.binary(max_size=200),
)
def test_any_bytes(start, rest):
    try:
        header = probe_header(start + rest)
        assert header.width > 0 and header.height > 0
    except ImageError as error:
        assert "0x" not in error.message


def test_a_bomb_is_known_by_its_header_alone():
    ihdr = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")
    assert (probe_header(data).width, probe_header(data).height) == (13000, 13000)
