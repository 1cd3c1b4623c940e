"""What a request says of its pictures' size, from prompt to patches: keys, refusals, equality with transformers."""

import io
import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmv1.errors import ContextLengthError, ImageError, RequestError
from mmv1.preprocess.image_settings import picture_settings, processor_settings
from mmv1.preprocess.prompt import ImagePart, Message
from mmv1.preprocess.slab import aligned
from tests.pictures import make_image
from tests.preprocess.test_decode import png
from tests.preprocess.test_preprocessor import Harness

MIN, MAX = 3136, 600 * 784
LOW = 512 * 512


@pytest.fixture(scope="module")
def harness(tiny_model_dir):
    harness = Harness(tiny_model_dir, min_pixels=MIN, max_pixels=MAX)
    harness.run(harness.pre.wait_ready())
    yield harness
    harness.close()


numbers = itertools.count()


def prepare(harness, *pictures, kwargs=None):
    """The features of one message of pictures, each encoded bytes or (bytes, what is said of them)."""
    parts = []
    for place, picture in enumerate(pictures):
        source, said = picture if isinstance(picture, tuple) else (picture, {})
        parts.append(ImagePart(source, picture_settings(said, f"messages[0].content[{place}]")))
    request_id = f"limits{next(numbers)}"
    prepared = harness.run(harness.pre.prepare_chat(request_id, [Message("user", parts)], processor_settings(kwargs)))
    harness.pre.release_request(request_id)
    return prepared


def key(harness, picture, said, kwargs):
    (feature,) = prepare(harness, (picture, said), kwargs=kwargs).mm_features
    return feature.mm_hash


SAID = [{}, {"min_pixels": 5000}, {"max_pixels": 50_000}, {"min_pixels": 5000, "max_pixels": 50_000}, {"detail": "low"}]


def test_different_settings_are_different_keys(harness):
    picture = make_image(300, 200)
    keys = {key(harness, picture, said, kwargs) for said in SAID for kwargs in (None, {"max_pixels": 40_000})}
    # Twice the picture's own max_pixels leaves nothing of the request's; and low detail adds nothing to the request's 40,000.
    assert len(keys) == 2 * len(SAID) - 3
    assert key(harness, make_image(300, 200, seed=1), {}, None) not in keys


def test_equal_limits_are_equal_keys_however_they_are_spelled(harness):
    picture = make_image(300, 200)
    spellings = [
        ({}, None), ({"detail": "auto"}, {}), ({"detail": "high"}, None), ({"min_pixels": MIN}, None),
        ({"max_pixels": MAX}, None), ({}, {"min_pixels": MIN, "max_pixels": MAX}),
        ({}, {"size": {"shortest_edge": MIN, "longest_edge": MAX}}),
        ({"min_pixels": MIN, "max_pixels": MAX}, {"min_pixels": 5, "max_pixels": 99}),
    ]  # fmt: skip
    assert len({key(harness, picture, *spelling) for spelling in spellings}) == 1
    low = {"detail": "low"}
    lows = [(low, None), ({"max_pixels": LOW}, None), ({}, {"max_pixels": LOW}), (low, {"max_pixels": MAX})]
    assert len({key(harness, picture, *spelling) for spelling in lows}) == 1
    assert key(harness, picture, *lows[0]) != key(harness, picture, *spellings[0])


def test_low_detail_has_fewer_tokens(harness):
    picture = make_image(1200, 900)
    prepared = prepare(harness, picture, (picture, {"detail": "low"}), (picture, {"max_pixels": 50_000}))
    tokens = [feature.num_tokens for feature in prepared.mm_features]
    assert tokens[0] > LOW // 784 >= tokens[1] > 50_000 // 784 >= tokens[2]
    assert prepared.num_image_tokens == sum(tokens)
    assert prepared.prompt_token_ids.count(harness.pre.layout.image_token_id) == sum(tokens)


def random_limits(rng):
    most = rng.randint(784, MAX)
    return rng.randint(1, most) if rng.random() < 0.5 else min(MIN, most), most


def test_patches_are_those_of_transformers_with_the_same_limits(harness):
    """Both as a picture's own numbers and as the request's, in either spelling."""
    from transformers import Qwen2VLImageProcessor

    oracle = Qwen2VLImageProcessor(size={"shortest_edge": MIN, "longest_edge": MAX})
    layout, rng = harness.pre.layout, random.Random(3)
    num_compared = 0
    for seed in range(60):
        width, height = rng.randint(1, 900), rng.randint(1, 900)
        least, most = random_limits(rng)
        if max(width, height) > 200 * min(width, height):
            continue
        picture = make_image(width, height, seed, format="PNG")
        asked = {"min_pixels": least, "max_pixels": most}
        by_size = {"size": {"shortest_edge": least, "longest_edge": most}}
        said, kwargs = [(asked, None), ({}, asked), ({}, by_size)][seed % 3]
        expected = oracle(images=[Image.open(io.BytesIO(picture))], **(by_size if seed % 2 else asked), return_tensors="pt")
        try:
            prepared = harness.run(
                harness.pre.prepare_chat(
                    f"patches{seed}",
                    [Message("user", [ImagePart(picture, picture_settings(said, "x"))])],
                    processor_settings(kwargs),
                )
            )
        except ImageError as error:
            assert error.code == "image_too_large"
            assert len(expected["pixel_values"]) // 4 > layout.max_image_tokens(harness.model.max_model_len)
            continue
        (feature,) = prepared.mm_features
        assert list(feature.grid_thw) == expected["image_grid_thw"][0].tolist()
        harness.request(feature.mm_hash)
        (ready,) = harness.answers()
        assert torch.equal(normalised(harness.bytes_at(ready), layout), expected["pixel_values"].bfloat16()), (width, height)
        harness.release(feature.mm_hash)
        harness.pre.release_request(f"patches{seed}")
        num_compared += 1
    assert num_compared > 40


def normalised(patches, layout):
    """bfloat16 [num_patches, 1176] of patches in the slab, as the processor gives it: each frame twice."""
    mean, std = torch.tensor(layout.image_mean).view(1, 3, 1, 1, 1), torch.tensor(layout.image_std).view(1, 3, 1, 1, 1)
    frames = torch.frombuffer(bytearray(patches), dtype=torch.uint8).view(-1, 3, 1, 14, 14).float()
    return ((frames / 255 - mean) / std).expand(-1, 3, 2, 14, 14).reshape(-1, 1176).bfloat16()


@pytest.mark.parametrize(
    ("said", "kwargs", "param"),
    [
        ({"max_pixels": MAX + 1}, None, "messages[0].content[1].max_pixels"),
        ({}, {"max_pixels": MAX + 1}, "mm_processor_kwargs.max_pixels"),
        ({"min_pixels": 9, "max_pixels": 8}, None, "messages[0].content[1].min_pixels"),
    ],
)
def test_limits_that_cannot_be_are_refused_before_anything_is_fetched(harness, said, kwargs, param):
    before = harness.pre.stats()
    with pytest.raises(RequestError) as refusal:
        prepare(harness, "https://pictures.example/a.png", ("https://pictures.example/b.png", said), kwargs=kwargs)
    assert (refusal.value.param, refusal.value.status) == (param, 400)
    assert harness.pre.stats() == before


def test_processor_settings_of_a_prompt_without_pictures_are_checked(harness):
    with pytest.raises(RequestError, match=str(MAX)):
        harness.run(harness.pre.prepare_prompt("raw", "Hello", [], processor_settings({"max_pixels": MAX + 1})))


def test_a_picture_grown_past_what_the_server_is_sized_for_is_refused(harness):
    """Both sides are rounded up to whole tokens."""
    wide, square = make_image(480, 4), make_image(60, 60)
    most = harness.pre.layout.max_image_tokens(harness.model.max_model_len)
    with pytest.raises(ImageError, match=f"{most} at most") as refusal:
        prepare(harness, square, (wide, {"min_pixels": MAX, "max_pixels": MAX}))
    assert (refusal.value.code, refusal.value.status) == ("image_too_large", 400)
    assert refusal.value.message.startswith("image 2: ")
    assert prepare(harness, square, wide).num_image_tokens > 0
    with pytest.raises(ContextLengthError):
        prepare(harness, *[(square, {"min_pixels": MAX - 60_000, "max_pixels": MAX})] * 8)


pixels = st.none() | st.integers(1, MAX + 9) | st.integers(MAX - 5000, MAX)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6000), st.integers(1, 6000), pixels, pixels, pixels, pixels, st.sampled_from([None, "low", "high"]))
@example(480, 4, MAX, MAX, None, None, None)
@example(4, 480, None, None, MAX, None, None)
def test_whatever_is_asked_for_fits_or_is_refused(harness, width, height, own_min, own_max, all_min, all_max, detail):
    """What reaches the core fits the slab, the encoder cache and the step, which are all sized for `max_image_tokens`."""
    layout = harness.pre.layout
    most = layout.max_image_tokens(harness.model.max_model_len)
    said = {"min_pixels": own_min, "max_pixels": own_max, "detail": detail}
    kwargs = {"min_pixels": all_min, "max_pixels": all_max}
    try:
        (feature,) = prepare(harness, (png(width, height, b""), said), kwargs=kwargs).mm_features
    except RequestError as refusal:
        assert refusal.status == 400
        return
    assert feature.num_tokens <= most
    assert 2 * aligned(layout.image_bytes(feature.num_tokens)) <= harness.pre.slab.nbytes
