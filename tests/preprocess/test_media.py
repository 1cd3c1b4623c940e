"""Limits, PIL images and files, and the colour policy."""

import io

import numpy as np
import pytest
from PIL import Image

from mmv1.errors import ImageError
from mmv1.preprocess.header import ImageHeader
from mmv1.preprocess.media import ImageLimits, accept_bytes, encode_pil, ppm_pixels, read_file, to_rgb
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


def test_files(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(make_image(40, 30))
    assert read_file(path, LIMITS).header.width == 40
    with pytest.raises(ImageError, match=r"nothing\.jpg") as refusal:
        read_file(tmp_path / "nothing.jpg", LIMITS)
    assert str(tmp_path) not in refusal.value.message
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ImageError, match="MiB"):
        read_file(path, LIMITS)


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
