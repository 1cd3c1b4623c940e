"""What is decoded, and how: first frames, transparency, patches; hostile bytes end in ImageError."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmv1.errors import ImageError
from mmv1.preprocess.decode import decode_into, decode_rgb, resize, write_patches
from mmv1.preprocess.header import ImageHeader, probe_header
from mmv1.preprocess.layout import Qwen2VLLayout
from mmv1.preprocess.pool_messages import PatchJob
from tests.pictures import make_image, make_pil

IDS = {"image_token_id": 1, "video_token_id": 2}
LAYOUT = Qwen2VLLayout({}, IDS, min_pixels=3136, max_pixels=200 * 784)
EXTRA_FORMATS = ("BMP", "TIFF")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", *EXTRA_FORMATS)


def decode_job(header, offset=0, job_id=0, layout=LAYOUT):
    place = layout.place(header.width, header.height)
    return PatchJob(
        job_id=job_id, header=header, resized_height=place.resized_height, resized_width=place.resized_width,
        patch_size=14, merge_size=2, resample="bicubic", offset=offset, nbytes=place.nbytes,
    )  # fmt: skip


def our_patches(encoded, header=None, layout=LAYOUT):
    """uint8 [num_patches, 588], by the path a pool process takes."""
    job = decode_job(header or probe_header(encoded, EXTRA_FORMATS), layout=layout)
    out = bytearray(b"M" * job.nbytes)
    decode_into(encoded, job, memoryview(out))
    return torch.frombuffer(out, dtype=torch.uint8).view(-1, layout.row_bytes)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, raw, depth=8, colour_type=2):
    ihdr = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_the_first_frame_of_an_animation():
    frames = [make_pil(60, 40, seed) for seed in range(3)]
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_every_orientation_is_pillows(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    make_pil(13, 7, orientation).save(encoded, format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(encoded))
    header = probe_header(encoded.getvalue(), EXTRA_FORMATS)
    assert np.array_equal(decode_rgb(encoded.getvalue(), header).numpy(), np.asarray(upright))


def test_orientation_in_xmp_is_left_alone():
    """By browsers too. Pillow turns a TIFF by it while loading; the probe, which lays out the prompt, does not read XMP."""
    encoded = io.BytesIO()
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    make_pil(90, 60).save(encoded, "TIFF", tiffinfo={700: packet})
    opened = Image.open(encoded)
    opened.load()
    assert opened.size == (60, 90)
    assert np.array_equal(decode_rgb(encoded.getvalue(), ImageHeader("TIFF", 90, 60)).numpy(), np.asarray(make_pil(90, 60)))


def test_patches_are_cut_in_windows_channel_first():
    rgb = torch.arange(56 * 84 * 3).reshape(56, 84, 3).to(torch.uint8)
    patches = rgb.reshape(2, 2, 14, 3, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 588)
    for layout_in_memory in (rgb, rgb.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        out = torch.zeros(patches.numel(), dtype=torch.uint8)
        write_patches(layout_in_memory, 14, 2, out)
        assert torch.equal(out.view(-1, 588), patches)


@pytest.mark.parametrize("format", FORMATS)
def test_cut_off_files_fail(format):
    encoded = make_image(200, 150, format=format)
    header = probe_header(encoded, EXTRA_FORMATS)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ImageError) as failure:
            decode_rgb(encoded[: int(len(encoded) * share)], header)
        assert "0x" not in failure.value.message and "/" not in failure.value.message


@pytest.mark.filterwarnings("ignore:Tag data larger:UserWarning")
def test_damaged_files_fail_or_decode_but_nothing_else():
    rng = random.Random(2)
    for format in FORMATS:
        encoded = make_image(90, 60, format=format)
        header = probe_header(encoded, EXTRA_FORMATS)
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
