"""The one size of a CLIP model: against torchvision, whose transforms open_clip uses; open_clip's own are in tests/embedding/."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from mmv1.preprocess.crop import CropRules, cropped
from mmv1.preprocess.decode import decode_into
from mmv1.preprocess.header import probe_header
from mmv1.preprocess.pool_messages import CropJob
from tests.pictures import make_image, make_pil

SIZES = [
    (32, 32), (33, 32), (32, 33), (31, 500), (500, 31), (1, 1), (1, 150), (640, 427), (333, 1001), (17, 16), (64, 63), (223, 97),
]  # fmt: skip


def pixels(image: Image.Image) -> bytes:
    assert image.mode == "RGB"
    return image.tobytes()


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_torchvisions(size: tuple[int, int], resample: str) -> None:
    picture = make_pil(*size, seed=1).convert("RGB")
    mode = InterpolationMode(resample)
    for side in (32, 49):
        shortest = CropRules(height=side, width=side, resample=resample)  # type: ignore[arg-type]
        assert pixels(cropped(picture, shortest)) == pixels(Compose([Resize(side, mode), CenterCrop(side)])(picture))
    squash = CropRules(height=24, width=40, resize_mode="squash", resample=resample)  # type: ignore[arg-type]
    assert pixels(cropped(picture, squash)) == pixels(Resize((24, 40), mode)(picture))


def test_longest_keeps_all_of_the_picture_and_fills_the_rest() -> None:
    rules = CropRules(height=20, width=30, resize_mode="longest", fill_color=7)
    assert rules.resized_size(60, 20) == (30, 10) and rules.resized_size(10, 40) == (5, 20)
    assert rules.resized_size(3000, 1) == (30, 1)  # and not no line at all
    wide = np.asarray(cropped(Image.new("RGB", (60, 20), (200, 0, 0)), rules))
    assert (wide[:5] == 7).all() and (wide[15:] == 7).all() and (wide[5:15] == (200, 0, 0)).all()


def test_shortest_covers_a_target_that_is_no_square() -> None:
    rules = CropRules(height=20, width=30)
    assert rules.resized_size(60, 60) == (30, 30) and rules.resized_size(90, 20) == (90, 20)
    picture = Image.new("RGB", (90, 20))
    picture.paste((9, 9, 9), (30, 0, 60, 20))
    assert set(pixels(cropped(picture, rules))) == {9}


def test_a_job_of_the_pool_writes_lines_of_pixels() -> None:
    rules = CropRules(height=16, width=16)
    encoded = make_image(50, 40, 3, "PNG")
    place = rules.place()
    assert (place.nbytes, place.grid_thw, place.num_tokens) == (768, (1, 16, 16), 0)
    out = bytearray(place.nbytes)
    job = CropJob(job_id=0, header=probe_header(encoded), rules=rules, offset=0, nbytes=place.nbytes)
    assert min(decode_into(encoded, job, memoryview(out))) >= 0
    assert bytes(out) == pixels(cropped(make_pil(50, 40, 3).convert("RGB"), rules))


def test_whatever_decides_pixels_is_in_the_fingerprint() -> None:
    variants = [
        CropRules(height=16, width=16),
        CropRules(height=16, width=17),
        CropRules(height=17, width=16),
        CropRules(height=16, width=16, resample="bilinear"),
        CropRules(height=16, width=16, resize_mode="squash"),
        CropRules(height=16, width=16, resize_mode="longest"),
        CropRules(height=16, width=16, resize_mode="longest", fill_color=1),
    ]
    assert len({rules.fingerprint() for rules in variants}) == len(variants)
    assert CropRules(height=16, width=16).fingerprint() == variants[0].fingerprint()
