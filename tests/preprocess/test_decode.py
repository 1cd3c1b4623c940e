"""Patches equal to transformers' default image processor, bit for bit in bfloat16; hostile bytes end in ImageError."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmv1.errors import ImageError
from mmv1.preprocess.decode import decode_into, decode_rgb, resize
from mmv1.preprocess.header import ImageHeader, probe_header
from mmv1.preprocess.layout import Qwen2VLLayout
from mmv1.preprocess.media import ImageLimits, encode_pil
from mmv1.preprocess.pool_messages import DecodeJob
from tests.pictures import make_image, make_pil

IDS = {"image_token_id": 1, "video_token_id": 2}
LAYOUT = Qwen2VLLayout({}, IDS, min_pixels=3136, max_pixels=200 * 784)
LIMITS = ImageLimits(max_encoded_bytes=1 << 30, max_pixels=1 << 30, max_side=1 << 20)


@pytest.fixture(scope="module")
def oracle():
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(size={"shortest_edge": LAYOUT.min_pixels, "longest_edge": LAYOUT.max_pixels})


def decode_job(header, offset=0, job_id=0):
    place = LAYOUT.place(header.width, header.height)
    return DecodeJob(
        job_id=job_id, header=header, resized_height=place.resized_height, resized_width=place.resized_width,
        patch_size=14, merge_size=2, resample="bicubic", offset=offset, nbytes=place.nbytes,
    )  # fmt: skip


def our_patches(encoded, header=None):
    """uint8 [num_patches, 588], by the path a pool process takes."""
    header = header or probe_header(encoded)
    place = LAYOUT.place(header.width, header.height)
    out = bytearray(b"M" * place.nbytes)
    decode_into(encoded, decode_job(header), memoryview(out))
    return torch.frombuffer(out, dtype=torch.uint8).view(-1, LAYOUT.row_bytes)


def normalised(patches):
    """float32 [num_patches, 1176] as the processor gives it: scaled, normalised, the frame twice, channel by channel."""
    mean, std = torch.tensor(LAYOUT.image_mean), torch.tensor(LAYOUT.image_std)
    frames = patches.view(-1, 3, 1, 14, 14).float()
    frames = (frames / 255 - mean.view(1, 3, 1, 1, 1)) / std.view(1, 3, 1, 1, 1)
    return frames.expand(-1, 3, 2, 14, 14).reshape(-1, 1176)


def assert_equal(encoded, reference, oracle, header=None):
    expected = oracle(images=[reference], return_tensors="pt")
    ours = our_patches(encoded, header)
    header = header or probe_header(encoded)
    assert list(LAYOUT.place(header.width, header.height).grid_thw) == expected["image_grid_thw"][0].tolist()
    assert torch.equal(normalised(ours).bfloat16(), expected["pixel_values"].bfloat16())


def random_sizes(count):
    rng = random.Random(1)
    return [(rng.randint(1, 700), rng.randint(1, 700)) for _ in range(count)]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_equal_to_transformers_at_random_sizes(format, oracle):
    sizes = [(1, 1), (2, 3), (28, 28), (56, 84), (560, 280), (1400, 300), (150, 1), (300, 8), *random_sizes(15)]
    for number, (width, height) in enumerate(sizes):
        if max(width, height) > 200 * min(width, height):
            continue
        encoded = make_image(width, height, number, format)
        assert_equal(encoded, Image.open(io.BytesIO(encoded)), oracle)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("GIF", "L"),
        ("WEBP", "RGBA"),
    ],
)
def test_equal_in_other_modes(format, mode, oracle):
    encoded = io.BytesIO()
    make_pil(150, 90).convert(mode).save(encoded, format)  # alpha, where there is one, is opaque
    assert_equal(encoded.getvalue(), Image.open(encoded), oracle)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_equal_in_every_orientation(format, orientation, oracle):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    make_pil(130, 70, orientation).save(encoded, format, exif=exif)
    assert_equal(encoded.getvalue(), load_image(Image.open(encoded)), oracle)


def test_progressive_and_16_bit_colour(oracle):
    progressive = io.BytesIO()
    make_pil(200, 150).save(progressive, "JPEG", progressive=True, quality=60, subsampling=2)
    assert_equal(progressive.getvalue(), Image.open(progressive), oracle)
    row = np.random.default_rng(0).integers(0, 65536, (40, 60, 3)).astype(">u2")
    raw = b"".join(b"\0" + line.tobytes() for line in row)
    encoded = png(60, 40, raw, depth=16)
    assert_equal(encoded, Image.open(io.BytesIO(encoded)), oracle)


def test_pil_images_equal_their_files(oracle):
    source = make_pil(300, 200)
    image = encode_pil(source, LIMITS)
    assert_equal(image.data, source, oracle, image.header)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, raw, depth=8):
    ihdr = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_the_first_frame_of_an_animation():
    frames = [make_pil(60, 40, seed) for seed in range(3)]
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        encoded = io.BytesIO()
        frames[0].save(encoded, format, save_all=True, append_images=frames[1:], duration=50, **options)
        alone = io.BytesIO()
        frames[0].save(alone, format, **options)
        assert torch.equal(our_patches(encoded.getvalue()), our_patches(alone.getvalue())), format


def test_transparent_pixels_are_white():
    encoded = io.BytesIO()
    Image.new("RGBA", (56, 56), (200, 0, 0, 0)).save(encoded, "PNG")
    assert (our_patches(encoded.getvalue()) == 255).all()


def test_16_bit_grey():
    encoded = io.BytesIO()
    Image.fromarray(np.full((56, 56), 30000, dtype=np.uint16)).save(encoded, "PNG")
    assert (our_patches(encoded.getvalue()) == 117).all()


def test_a_picture_of_the_right_size_is_not_resized():
    rgb = torch.zeros(56, 56, 3, dtype=torch.uint8)
    assert resize(rgb, 56, 56, "bicubic") is rgb


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_off_files_fail(format):
    encoded = make_image(200, 150, format=format)
    header = probe_header(encoded)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ImageError) as failure:
            decode_rgb(encoded[: int(len(encoded) * share)], header)
        assert "0x" not in failure.value.message and "/" not in failure.value.message


def test_damaged_files_fail_or_decode_but_nothing_else():
    rng = random.Random(2)
    for format in ("JPEG", "PNG", "WEBP", "GIF"):
        encoded = make_image(90, 60, format=format)
        header = probe_header(encoded)
        for _ in range(60):
            damaged = bytearray(encoded)
            for _ in range(rng.randint(1, 10)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                assert decode_rgb(bytes(damaged), header).shape == (60, 90, 3)
            except ImageError as failure:
                assert "0x" not in failure.message


def test_another_size_than_probed_fails():
    encoded = make_image(90, 60)
    for header in (ImageHeader("JPEG", 91, 60), ImageHeader("JPEG", 60, 90), ImageHeader("JPEG", 90, 60, 6)):
        with pytest.raises(ImageError, match="size"):
            decode_rgb(encoded, header)


def test_only_the_probed_format_is_tried():
    with pytest.raises(ImageError):
        decode_rgb(make_image(90, 60, format="BMP"), ImageHeader("PNG", 90, 60))


def test_a_small_file_that_claims_a_large_picture():
    encoded = png(4000, 4000, b"")
    assert len(encoded) < 92
    with pytest.raises(ImageError):
        decode_rgb(encoded, probe_header(encoded))
