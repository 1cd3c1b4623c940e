"""JPEGs by the short way are what Pillow makes of them, and what Pillow calls damaged stays damaged."""

import io
import random
import time

import numpy as np
import pytest
import simplejpeg
from PIL import Image

import mmv1.preprocess.decode as decode_module
from mmv1.errors import ImageError
from mmv1.preprocess.decode import decode_rgb
from mmv1.preprocess.header import probe_header
from tests.pictures import make_pil

SIZES = [(1, 1), (7, 9), (16, 16), (17, 33), (200, 150), (129, 257)]
SUBSAMPLINGS = ["444", "422", "420", "440", "411", "Gray"]
PILLOW_OPTIONS = [
    {"progressive": True}, {"progressive": True, "subsampling": 0, "quality": 40}, {"optimize": True, "quality": 95},
    {"restart_marker_blocks": 3}, {"restart_marker_rows": 1, "subsampling": 1}, {"progressive": True, "restart_marker_rows": 1},
    {"quality": 100, "subsampling": 0}, {"comment": b"words", "dpi": (72, 72)}, {"smooth": 50},
]  # fmt: skip


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def stored_size(encoded):
    return Image.open(io.BytesIO(encoded)).size


def assert_as_pillow(encoded):
    short_way = decode_module._decode_jpeg(encoded, *stored_size(encoded))
    assert short_way is not None
    assert np.array_equal(short_way, np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.mark.parametrize("quality", [1, 10, 30, 50, 75, 85, 90, 95, 98, 100])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_qualities_and_subsamplings(subsampling, quality):
    for seed, size in enumerate(SIZES):
        picture = make_pil(*size, seed).convert("L" if subsampling == "Gray" else "RGB")
        array = np.ascontiguousarray(np.atleast_3d(np.asarray(picture)))
        assert_as_pillow(simplejpeg.encode_jpeg(array, quality, "GRAY" if subsampling == "Gray" else "RGB", subsampling))


@pytest.mark.parametrize("options", PILLOW_OPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ways_of_encoding(mode, options):
    for seed, size in enumerate(SIZES):
        assert_as_pillow(jpeg(make_pil(*size, seed).convert(mode), **options))


def test_other_colour_spaces_and_damage_are_pillows():
    picture = make_pil(60, 40)
    whole = jpeg(picture)
    for encoded in (jpeg(picture.convert("CMYK")), jpeg(picture, keep_rgb=True), whole[:-2], whole[: len(whole) // 2]):
        assert decode_module._decode_jpeg(encoded, 60, 40) is None
    assert decode_module._decode_jpeg(whole, 61, 40) is None


def verdict(encoded, header):
    """The pixels, or what is said of them."""
    try:
        return decode_rgb(encoded, header).numpy()
    except ImageError as error:
        return error.message


def damaged(encoded, rng):
    """Cut off, bytes changed, taken out or put in, behind the start of the pixels mostly."""
    data, start = bytearray(encoded), encoded.index(b"\xff\xda") if rng.random() < 0.7 else 20
    for _ in range(rng.choice((1, 1, 1, 5))):
        position = rng.randrange(start, len(data))
        match rng.randrange(5):
            case 0:
                del data[position:]
                data += bytes(100) if rng.random() < 0.5 else b""
            case 1:
                del data[position : position + rng.randrange(1, 50)]
            case 2:
                data[position:position] = bytes([0xFF, rng.randrange(0xC0, 0x100)])
            case _:
                data[position] = rng.randrange(256)
        if len(data) <= start + 1:
            break
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, *PILLOW_OPTIONS[:6]])
def test_the_verdict_is_pillows(options, monkeypatch):
    rng = random.Random(str(options))
    encoded = jpeg(make_pil(150, 90), **options)
    header = probe_header(encoded)
    files = [damaged(encoded, rng) for _ in range(150)]
    ours = [verdict(file, header) for file in files]
    monkeypatch.setattr(decode_module, "_decode_jpeg", lambda *args: None)
    pillows = [verdict(file, header) for file in files]
    for ours_of_it, pillows_of_it in zip(ours, pillows, strict=True):
        assert type(ours_of_it) is type(pillows_of_it) and np.array_equal(ours_of_it, pillows_of_it)
    assert len({type(pillows_of_it) for pillows_of_it in pillows}) == 2  # some were readable, some were not


def test_a_progressive_jpeg_of_thousands_of_scans_costs_nothing():
    """A few kilobytes could keep a pool process busy for half a minute, twice."""
    whole = jpeg(Image.new("L", (2000, 2000)), progressive=True)
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    bomb = whole[:-2] + 1500 * last_scan + whole[-2:]
    started = time.process_time()
    with pytest.raises(ImageError, match="scans"):
        decode_rgb(bomb, probe_header(bomb))
    assert time.process_time() - started < 1.0  # its scans take five seconds
    few = whole[:-2] + 50 * last_scan + whole[-2:]
    assert decode_rgb(few, probe_header(few)).shape == (2000, 2000, 3)
