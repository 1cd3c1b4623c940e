"""The model's input is that of transformers' default image processor, bit for bit in bfloat16.

Ours: the patches a pool process makes, normalised by the model's own code. Theirs: Qwen2VLImageProcessor (torchvision), given the
picture as transformers' `load_image` opens it. One thing differs on purpose: transparency is laid on white, as Qwen's own
qwen-vl-utils does for RGBA, where `load_image` shows whatever colour lies under it; the reference here is laid on white likewise,
in every mode that has transparency. (16-bit grey differs too; see `media.to_rgb` and test_decode.)
"""

import io
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from mmv1.config import Normalization
from mmv1.models.layers.vision import PatchEmbed
from mmv1.preprocess.header import probe_header
from mmv1.preprocess.layout import Qwen2VLLayout
from mmv1.preprocess.media import ImageLimits, encode_pil
from tests.pictures import encode, make_image, make_pil
from tests.preprocess.test_decode import EXTRA_FORMATS, IDS, our_patches, png

LIMITS = ImageLimits(max_encoded_bytes=1 << 30, max_pixels=1 << 30, max_side=1 << 20)
# Nothing is resized but to multiples of 28; much is shrunk; all is shrunk to a strip or a stamp; all is enlarged.
PIXEL_LIMITS = [(3136, 12_845_056), (3136, 200 * 784), (784, 20 * 784), (400_000, 500_000)]
NUM_SIZES = 16  # random ones, for each format and each of these limits


@cache
def layout(pixel_limits):
    return Qwen2VLLayout({}, IDS, min_pixels=pixel_limits[0], max_pixels=pixel_limits[1])


@cache
def oracle(pixel_limits):
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(size={"shortest_edge": pixel_limits[0], "longest_edge": pixel_limits[1]})


@cache
def patch_embed():
    ours = layout(PIXEL_LIMITS[0])
    shape = SimpleNamespace(
        hidden_size=1, in_channels=3, temporal_patch_size=2, spatial_merge_size=2, patch_size=14, patch_numbers=588
    )
    return PatchEmbed(shape, Normalization(ours.image_mean, ours.image_std, ours.rescale_factor), bias=False)


def reference(encoded):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    on_white = Image.new("RGB", rgba.size, (255, 255, 255))
    on_white.paste(rgba, mask=rgba.split()[3])
    return on_white


def assert_exact(encoded, picture=None, header=None, pixel_limits=PIXEL_LIMITS[1]):
    expected = oracle(pixel_limits)(images=[picture or reference(encoded)], return_tensors="pt")
    header = header or probe_header(encoded, EXTRA_FORMATS)
    place = layout(pixel_limits).place(header.width, header.height)
    assert list(place.grid_thw) == expected["image_grid_thw"][0].tolist()
    patches = our_patches(encoded, header, layout(pixel_limits))
    one_frame = patch_embed().normalize(patches, torch.arange(len(patches) // 4))[:, :588].contiguous()
    both_frames = one_frame.view(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176)
    assert torch.equal(both_frames.bfloat16(), expected["pixel_values"].bfloat16())


def random_size(rng):
    """Either a picture of any shape, or a long and thin one."""
    while True:
        longest = 600 if rng.random() < 0.8 else 1500
        width, height = rng.randint(1, longest), rng.randint(1, 600 * 600 // longest)
        if max(width, height) <= 200 * min(width, height):
            return (width, height) if rng.random() < 0.5 else (height, width)


@pytest.mark.slow
@pytest.mark.parametrize("pixel_limits", PIXEL_LIMITS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_random_sizes(format, pixel_limits):
    rng = random.Random(f"{format} {pixel_limits}")
    for number, size in enumerate([(1, 1), (28, 28), (150, 1), *(random_size(rng) for _ in range(NUM_SIZES))]):
        assert_exact(make_image(*size, number, format), pixel_limits=pixel_limits)


@pytest.mark.parametrize("format", EXTRA_FORMATS)
def test_sizes_in_the_extra_formats(format):
    rng = random.Random(format)
    for number, size in enumerate([(1, 1), (28, 28), (150, 1), *(random_size(rng) for _ in range(6))]):
        assert_exact(make_image(*size, number, format))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    make_pil(130, 70, orientation).save(encoded, format, exif=exif)
    assert_exact(encoded.getvalue())


def in_mode(mode):
    """A picture of this mode, with every degree of transparency where the mode has any."""
    picture = make_pil(150, 90)
    if mode in ("LA", "RGBA"):
        alpha = Image.linear_gradient("L").resize(picture.size)
        picture.putalpha(alpha)
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "P", "LA", "RGBA")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("1", "L", "P", "RGB", "LA", "RGBA", "CMYK", "YCbCr", "LAB")),
        *(("GIF", mode) for mode in ("1", "L", "P")),
        *(("JPEG", mode) for mode in ("L", "CMYK")),
        *(("WEBP", mode) for mode in ("RGBA", "L")),
    ],
)
def test_every_mode(format, mode):
    encoded = encode(in_mode(mode), format)
    assert_exact(encoded)


@pytest.mark.parametrize(
    ("format", "mode", "transparent"),
    [*(("PNG", mode, None) for mode in ("1", "L", "P")), ("PNG", "P", bytes(range(256))), ("GIF", "L", None), ("GIF", "P", None)],
)
def test_transparent_colours(format, mode, transparent):
    """One colour of the palette, the one in the middle of the picture, or each to its own degree."""
    picture, encoded = in_mode(mode), io.BytesIO()
    picture.save(encoded, format, transparency=transparent or picture.getpixel((75, 45)), optimize=False)
    assert Image.open(encoded).has_transparency_data
    assert_exact(encoded.getvalue())


def test_a_transparent_colour_of_an_rgb_picture():
    picture, encoded = in_mode("RGB"), io.BytesIO()
    picture.save(encoded, "PNG", transparency=picture.getpixel((75, 45)))
    assert Image.open(encoded).mode == "RGB"
    assert_exact(encoded.getvalue())


def test_jpegs_of_other_colour_spaces():
    rgb, cmyk = np.asarray(make_pil(150, 90)), np.asarray(make_pil(150, 90).convert("CMYK"))
    adobe_rgb = io.BytesIO()
    Image.fromarray(rgb).save(adobe_rgb, "JPEG", keep_rgb=True)
    for encoded, colours in (
        (simplejpeg.encode_jpeg(np.ascontiguousarray(cmyk), 90, "CMYK", "420"), "YCCK"),
        (adobe_rgb.getvalue(), "RGB"),
    ):
        assert simplejpeg.decode_jpeg_header(encoded)[2] == colours
        assert_exact(encoded)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour(channels):
    rows = np.random.default_rng(0).integers(0, 65536, (40, 60, channels)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    assert_exact(png(60, 40, raw, depth=16, colour_type={3: 2, 4: 6}[channels]))


def test_a_first_frame():
    frames = [make_pil(60, 40, seed) for seed in range(3)]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        encoded = io.BytesIO()
        frames[0].save(encoded, format, save_all=True, append_images=frames[1:])
        assert_exact(encoded.getvalue())


def test_pil_images():
    source = make_pil(300, 200)
    image = encode_pil(source, LIMITS)
    assert_exact(image.data, source, image.header)
