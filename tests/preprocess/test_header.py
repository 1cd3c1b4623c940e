"""The header probe agrees with Pillow on real files, and survives any bytes."""

import io
import struct
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmv1.errors import ImageError
from mmv1.preprocess.header import probe_header

EXTRA = ("BMP", "TIFF")
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
        ("BMP", "RGB", {}),
        ("BMP", "1", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "I;16", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {"compression": "jpeg"}),
        ("TIFF", "RGB", {"big_tiff": False, "software": "words"}),
    ],
)
def test_size_and_format(size, format, mode, options):
    header = probe_header(save(Image.new(mode, size), format, **options), EXTRA)
    assert (header.format, header.width, header.height, header.orientation) == (format, *size, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_as_pillow_sees_it(format, orientation):
    data = save(Image.new("RGB", (40, 30)), format, exif=orientation_exif(orientation))
    header = probe_header(data, EXTRA)
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
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = save(frames[0], format, save_all=True, append_images=frames[1:])
        assert (probe_header(data, EXTRA).width, probe_header(data, EXTRA).height) == (60, 40)


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg></svg>", b"BM" + bytes(100), b"II*\0" + bytes(100), b"P6\n1 1\n255\nabc"])
def test_other_bytes_are_refused(data):
    with pytest.raises(ImageError) as refusal:
        probe_header(data)
    assert refusal.value.code == ("unsupported_image_format" if data else "invalid_image")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_and_damaged_headers_never_raise_anything_else(format):
    data = save(Image.new("RGB", (64, 48)), format, **({} if format in ("GIF", "BMP") else {"exif": orientation_exif(6)}))
    for end in range(len(data)):
        try:
            probe_header(data[:end], EXTRA)
        except ImageError:
            pass


@pytest.mark.parametrize(
    ("extra", "accepted"),
    [((), "JPEG, PNG, WebP or GIF"), (("BMP",), "JPEG, PNG, WebP, GIF or BMP"), (EXTRA, "JPEG, PNG, WebP, GIF, BMP or TIFF")],
)
def test_extra_formats_are_accepted_only_when_asked_for(extra, accepted):
    for format in EXTRA:
        data = save(Image.new("RGB", (40, 30)), format)
        if format in extra:
            assert probe_header(data, extra).format == format
        else:
            with pytest.raises(ImageError) as refusal:
                probe_header(data, extra)
            assert refusal.value.code == "unsupported_image_format"
    with pytest.raises(ImageError) as refusal:
        probe_header(b"<svg></svg>", extra)
    assert refusal.value.message == f"not a {accepted} image"


def test_bmp_headers_of_every_kind():
    for header_bytes, sizes in ((12, "<HH"), (40, "<ii"), (52, "<ii"), (64, "<ii"), (108, "<ii"), (124, "<ii")):
        start = b"BM" + bytes(12) + struct.pack("<I", header_bytes)
        header = probe_header(start + struct.pack(sizes, 50, 20) + bytes(header_bytes), EXTRA)
        assert (header.width, header.height) == (50, 20)
    info = struct.pack("<Iii", 40, 50, -20) + struct.pack("<HHIIIIII", 1, 24, 0, 0, 0, 0, 0, 0)
    top_down = b"BM" + bytes(12) + info + bytes(3100)
    assert (probe_header(top_down, EXTRA).width, probe_header(top_down, EXTRA).height) == (50, 20)
    assert Image.open(io.BytesIO(top_down)).size == (50, 20)
    with pytest.raises(ImageError):
        probe_header(b"BM" + bytes(12) + struct.pack("<Iii", 41, 50, 20), EXTRA)


def tiff(tags, order="<", count=None):
    """A TIFF of one directory and no pixels. `tags`: (tag, type, value)."""
    entries = b"".join(struct.pack(order + "HHI", tag, kind, 1) + value.ljust(4, b"\0") for tag, kind, value in tags)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags) if count is None else count)
    return start + entries + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_both_byte_orders_and_number_types(order):
    def numbers(kind, letter, width, height):
        return [(256, kind, struct.pack(order + letter, width)), (257, kind, struct.pack(order + letter, height))]

    for kind, letter in ((3, "H"), (4, "I")):
        header = probe_header(tiff(numbers(kind, letter, 500, 300), order), EXTRA)
        assert (header.format, header.width, header.height, header.orientation) == ("TIFF", 500, 300, 1)
    rotated = tiff([*numbers(4, "I", 500, 300), (274, 3, struct.pack(order + "H", 8))], order)
    assert (probe_header(rotated, EXTRA).width, probe_header(rotated, EXTRA).height) == (300, 500)
    odd = tiff([*numbers(4, "I", 500, 300), (274, 3, struct.pack(order + "H", 9))], order)
    assert probe_header(odd, EXTRA).orientation == 1
    without_size = [tiff(numbers(4, "I", 500, 300)[:1], order), tiff(numbers(5, "I", 500, 300), order)]
    for data in (*without_size, tiff([], order), tiff([], order, count=65_535) + bytes(12 * 65_535)):
        with pytest.raises(ImageError) as refusal:
            probe_header(data, EXTRA)
        assert refusal.value.code == "invalid_image"


def test_tiff_directories_that_loop_or_lie_outside():
    for directory in (0, 1, 4, 1 << 31, (1 << 32) - 1):
        with pytest.raises(ImageError):
            probe_header(b"II*\0" + struct.pack("<I", directory) + bytes(100), EXTRA)


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from(
        [
            *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8X", b"GIF89a"),
            *(b"BM" + bytes(12) + b"\x28\0\0\0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\x03"),
        ]
    ),
    rest=st.binary(max_size=200),
)
def test_any_bytes(start, rest):
    try:
        header = probe_header(start + rest, EXTRA)
        assert header.width > 0 and header.height > 0
    except ImageError as error:
        assert "0x" not in error.message


def test_a_bomb_is_known_by_its_header_alone():
    ihdr = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")
    assert (probe_header(data).width, probe_header(data).height) == (13000, 13000)


SMALL_GIF = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
MANY_TAGS = b"Exif\0\0" + tiff([(0x9000, 3, b"\1\0")] * 4096)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        *((b"\xff\xd8", piece) for piece in (b"\xff", b"\xff\xd0", b"\xff\xe0\0\2")),
        (b"\xff\xd8", b"\xff\xe1" + struct.pack(">H", 2 + len(MANY_TAGS)) + MANY_TAGS),
        *((SMALL_GIF + b"\x21\xfe", piece) for piece in (b"\1\1", b"\0\x21\xfe")),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBBI", 1, 1, 8, 2, 0, 0, 0, 0), b"\0\0\0\0tEXt\0\0\0\0"),
        (b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<II6x", 10, 8), b"ICCP\0\0\0\0"),
    ],
)
def test_a_header_of_20_megabytes_does_not_hold_up_the_event_loop(start, piece):
    data = start + piece * (20_000_000 // len(piece))
    started = time.process_time()
    try:
        probe_header(data)
    except ImageError:
        pass
    assert time.process_time() - started < 0.1


def test_a_jpeg_of_two_exif_segments():
    """What is in the second belongs to the first's data: it is no directory of its own."""
    segments = [b"Exif\0\0" + tiff([(tag, 3, b"\6\0")]) for tag in (0x010F, 0x0112)]
    both = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment for segment in segments)
    plain = save(Image.new("RGB", (50, 30)), "JPEG")
    data = plain[:2] + both + plain[2:]
    assert (probe_header(data).width, probe_header(data).height) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
