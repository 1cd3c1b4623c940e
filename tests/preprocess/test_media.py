"""Limits, PIL images and files, and the colour policy."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from mmv1.errors import ImageError
from mmv1.preprocess.header import ImageHeader
from mmv1.preprocess.media import ImageLimits, accept_bytes, encode_pil, ppm_pixels, to_rgb
from tests.pictures import make_image, make_pil

LIMITS = ImageLimits(max_encoded_bytes=1 << 20, max_pixels=1_000_000, max_side=5000)


def test_bytes_are_probed():
    image = accept_bytes(make_image(40, 30), LIMITS)
    assert image.header == ImageHeader("JPEG", 40, 30)


@pytest.mark.parametrize(
    ("size", "code"), [((1, 5000), "invalid_image"), ((1001, 1000), "image_too_large"), ((5001, 100), "image_too_large")]
)
def test_limits_from_the_header(size, code):
    with pytest.raises(ImageError) as refusal:
        accept_bytes(make_image(*size, format="PNG"), LIMITS)
    assert refusal.value.code == code


def test_extra_formats_are_a_limit_too():
    data = make_image(40, 30, format="TIFF")
    with pytest.raises(ImageError) as refusal:
        accept_bytes(data, LIMITS)
    assert refusal.value.code == "unsupported_image_format"
    assert accept_bytes(data, dataclasses.replace(LIMITS, extra_formats=("TIFF",))).header == ImageHeader("TIFF", 40, 30)


def test_limits_at_their_edge():
    for size in ((1000, 1000), (200, 1), (1, 200), (5000, 200)):
        assert accept_bytes(make_image(*size), LIMITS).header.width == size[0]


def test_too_many_bytes():
    with pytest.raises(ImageError) as refusal:
        accept_bytes(bytes((1 << 20) + 1), LIMITS)
    assert refusal.value.code == "image_too_large"


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "I;16"])
def test_pil_images_become_ppm(mode):
    source = Image.new("I;16", (20, 10), 40000) if mode == "I;16" else make_pil(20, 10).convert(mode)
    image = encode_pil(source, LIMITS)
    assert image.header == ImageHeader("PPM", 20, 10)
    pixels = np.frombuffer(ppm_pixels(image.data, 20, 10), dtype=np.uint8).reshape(10, 20, 3)
    assert (pixels == np.asarray(to_rgb(source))).all()
    assert Image.open(io.BytesIO(image.data)).size == (20, 10)  # a real PPM


def test_pil_images_of_the_same_raw_bytes_are_different_pictures():
    """T-H1, offline: what alone differs is the size, the mode, the palette, the type of the numbers, or the order in memory."""
    raw = np.random.default_rng(1).integers(0, 256, 9000, dtype=np.uint8)
    grey = Image.frombytes("L", (90, 100), raw.tobytes())
    palette, other_palette = grey.copy(), grey.copy()
    palette.putpalette(bytes(range(256)) * 3)
    other_palette.putpalette(bytes(range(255, -1, -1)) * 3)
    see_through = grey.copy()
    see_through.info["transparency"] = int(raw[1])
    square = raw[:2500].reshape(50, 50)
    pictures = [
        grey, palette, other_palette, see_through, Image.frombytes("L", (100, 90), raw.tobytes()),
        Image.frombytes("RGB", (30, 100), raw.tobytes()),
        Image.frombytes("RGB", (100, 30), raw.tobytes()), Image.frombytes("1", (720, 100), raw.tobytes()),
        Image.frombytes("I;16", (45, 100), raw.tobytes()), Image.frombytes("RGBA", (45, 50), raw.tobytes()),
        Image.frombytes("CMYK", (45, 50), raw.tobytes()), Image.frombytes("LA", (45, 100), raw.tobytes()),
        Image.fromarray(square), Image.fromarray(square.T), Image.fromarray(square[::-1]),
    ]  # fmt: skip
    assert len({encode_pil(picture, LIMITS).data for picture in pictures}) == len(pictures)
    in_rows, in_columns = np.ascontiguousarray(square.T), np.asfortranarray(square.T)
    assert encode_pil(Image.fromarray(in_rows), LIMITS) == encode_pil(Image.fromarray(in_columns), LIMITS)


def test_a_pil_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    make_pil(20, 10).save(buffer, "PNG", exif=exif)
    assert encode_pil(Image.open(buffer), LIMITS).header == ImageHeader("PPM", 10, 20)


def test_a_damaged_pil_image_is_an_image_error():
    data = make_image(200, 200)
    with pytest.raises(ImageError) as refusal:
        encode_pil(Image.open(io.BytesIO(data[: len(data) // 2])), LIMITS)
    assert "0x" not in refusal.value.message


def test_incomplete_ppm():
    data = encode_pil(make_pil(20, 10), LIMITS).data
    for damaged in (data[:-1], data + b"\0", b"P5" + data[2:], b""):
        with pytest.raises(ImageError):
            ppm_pixels(damaged, 20, 10)
    with pytest.raises(ImageError):
        ppm_pixels(data, 10, 20)


def pixel(image):
    return np.asarray(to_rgb(image))[0, 0].tolist()


def test_transparency_is_laid_on_white():
    assert pixel(Image.new("RGBA", (1, 1), (200, 0, 0, 0))) == [255, 255, 255]
    assert pixel(Image.new("RGBA", (1, 1), (200, 0, 0, 255))) == [200, 0, 0]
    assert pixel(Image.new("RGBA", (1, 1), (255, 0, 0, 128))) == [255, 127, 127]
    assert pixel(Image.new("LA", (1, 1), (0, 0))) == [255, 255, 255]
    assert pixel(Image.new("LA", (1, 1), (9, 255))) == [9, 9, 9]


@pytest.mark.parametrize(("mode", "transparent"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0)])
def test_a_transparent_colour_is_white(mode, transparent):
    buffer = io.BytesIO()
    Image.new(mode, (2, 2)).save(buffer, "PNG", transparency=transparent)
    assert pixel(Image.open(buffer)) == [255, 255, 255]


def test_16_bit_grey_keeps_its_high_byte():
    values = np.array([[0, 255, 256, 30000, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 117, 255]
