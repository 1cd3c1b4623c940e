"""Sizes, grids and token counts as transformers computes them, and bounds that hold."""

import dataclasses
import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmv1.config import ModelConfig
from mmv1.errors import ConfigError, ImageError, RequestError
from mmv1.models import registry
from mmv1.preprocess.image_settings import ImageSettings, picture_settings, processor_settings
from mmv1.preprocess.layout import PixelLimits, Qwen2VLLayout, TextLayout, load_layout

IDS = {"image_token_id": 1, "video_token_id": 2}


def make_layout(processor=None, **overrides):
    return Qwen2VLLayout(processor or {}, IDS, **overrides)


def model_config(path, **changes):
    config = ModelConfig(
        path=str(path), served_model_name="m", architecture="Qwen2_5_VLForConditionalGeneration", hf_config=IDS, dtype="float32",
        load_format="auto", max_model_len=4096, max_model_len_is_given=False, eos_token_ids=(), vocab_size=100, seed=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def random_sizes(count, limit=6000):
    rng = random.Random(0)
    sizes = [(rng.randint(1, limit), rng.randint(1, limit)) for _ in range(count)]
    sizes += [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(count)]
    sizes += [(rng.randint(1, 30), rng.randint(1, limit)) for _ in range(count)]
    sizes += [(14 * rng.randint(1, 99), 14 * rng.randint(1, 99)) for _ in range(count)]  # halves, which round to even
    return sizes


@pytest.mark.parametrize(
    ("low", "high", "patch"),
    [(3136, 1003520, 14), (3136, 12845056, 14), (3136, 50176, 14), (784, 784, 14), (256 * 784, 260 * 784, 14),
     (65536, 16777216, 16), (4096, 100 * 1024, 16)],
)  # fmt: skip
def test_equal_to_transformers(low, high, patch):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

    oracle = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high}, patch_size=patch)
    processor = {"patch_size": patch}
    layout, limits = make_layout(processor, min_pixels=low, max_pixels=high), PixelLimits(low, high)
    most = layout.max_image_tokens(1 << 30)
    for height, width in random_sizes(500):
        try:
            expected = smart_resize(height, width, 2 * patch, low, high)
        except ValueError:
            with pytest.raises(ImageError):
                layout.place(width, height)
            continue
        place = layout.place(width, height)
        assert place == make_layout(processor).place(width, height, limits)  # asked for by a request
        assert (place.resized_height, place.resized_width) == expected
        assert place.num_tokens * 4 == oracle.get_number_of_image_patches(height, width)
        assert place.grid_thw == (1, expected[0] // patch, expected[1] // patch)
        assert place.nbytes == place.grid_thw[1] * place.grid_thw[2] * 3 * patch**2
        assert 1 <= place.num_tokens <= most


@pytest.mark.parametrize(("low", "high"), [(3136, 1003520), (3136, 50176), (784, 784), (1, 784), (100 * 784, 101 * 784)])
def test_no_shape_has_more_tokens_than_the_bound(low, high):
    layout = make_layout(min_pixels=low, max_pixels=high)
    bound = layout.max_image_tokens(1 << 30)
    worst = 0
    for aspect in (1, 1.5, 2, 3, 7, 20, 50, 99, 150, 199, 200):
        for side in (1, 2, 3, 5, 10, 27, 28, 29, 42, 56, 100, 300, 700, 1500):
            for width, height in ((round(side * aspect), side), (side, round(side * aspect))):
                if max(width, height) <= 200 * min(width, height):
                    worst = max(worst, layout.place(width, height).num_tokens)
    assert worst <= bound
    assert bound <= 8 * worst + 64  # and it is a bound worth having


pixels = st.integers(1, 300_000) | st.integers(1, 3_000_000)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 6000), st.floats(1, 200), st.booleans(), st.tuples(pixels, pixels, pixels))
@example(56, 1, True, (1003520, 1003520, 1003520))  # both sides are rounded up
@example(1, 200, False, (1, 784, 784))  # a strip, longer than its pixels allow
def test_the_bound_holds_for_all_limits(side, aspect, is_wide, numbers):
    """And what a request asks for within the server's limits passes the server's bound only by a min_pixels of its own."""
    low, high, highest = sorted(numbers)
    width, height = (int(side * aspect), side) if is_wide else (side, int(side * aspect))
    layout, limits = make_layout(min_pixels=low, max_pixels=highest), PixelLimits(low, high)
    place = layout.place(width, height, limits)
    assert place.num_tokens <= layout.most_tokens(limits) <= layout.max_image_tokens(1 << 30)
    assert place.nbytes == layout.image_bytes(place.num_tokens)
    grown = layout.place(width, height, PixelLimits(high, high))
    assert grown.num_tokens <= layout.most_tokens(PixelLimits(high, high))


def test_max_image_tokens_within_the_context():
    assert make_layout().max_image_tokens(100) == 99
    assert make_layout().max_image_tokens(100_000) == 1280


@pytest.mark.parametrize(
    "processor",
    [
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12845056},
    ],
)
def test_both_dialects(processor):
    layout = make_layout(processor)
    assert layout.limits == (3136, 12845056)
    assert make_layout(processor, max_pixels=50176).limits == (3136, 50176)


def test_defaults_are_transformers():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    # Its pixel limits are a dict of the class, which every instance made with other limits writes to: hence a size of our own.
    oracle, layout = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}), make_layout()
    assert layout.limits == (56 * 56, 28 * 28 * 1280)  # as the class is written
    for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor"):
        assert getattr(layout, name) == pytest.approx(getattr(oracle, name), abs=0, rel=1e-15), name


SERVER = PixelLimits(3136, 1003520)
NOTHING = ImageSettings()
LOW = 512 * 512


def in_force(picture=None, request=None, server=SERVER):
    layout = make_layout(min_pixels=server[0], max_pixels=server[1])
    (limits,) = layout.limits_in_force(processor_settings(request), [picture_settings(picture or {}, "messages[0].content[1]")])
    return limits


@pytest.mark.parametrize(
    ("picture", "request_kwargs", "expected"),
    [
        ({}, None, SERVER),
        ({"detail": "auto"}, {}, SERVER),
        ({"detail": "high"}, {}, SERVER),
        ({"max_pixels": SERVER.max_pixels, "min_pixels": SERVER.min_pixels}, None, SERVER),
        ({}, {"max_pixels": 500_000}, (3136, 500_000)),
        ({"detail": "high"}, {"max_pixels": 500_000}, (3136, 500_000)),
        ({}, {"size": {"shortest_edge": 9000, "longest_edge": 500_000}}, (9000, 500_000)),
        ({"detail": "low"}, None, (3136, LOW)),
        ({"detail": "low"}, {"max_pixels": 500_000}, (3136, LOW)),
        ({"detail": "low"}, {"max_pixels": 100_000}, (3136, 100_000)),  # "at most"
        ({"detail": "low"}, {"min_pixels": 300_000}, (LOW, LOW)),  # the request's number gives way to the picture's detail
        ({"detail": "low"}, {"min_pixels": 9000}, (9000, LOW)),
        ({"detail": "low", "max_pixels": 700_000}, {"max_pixels": 500_000}, (3136, 700_000)),
        ({"detail": "low", "min_pixels": 9000}, {"min_pixels": 8000}, (9000, LOW)),
        ({"max_pixels": 700_000}, {"max_pixels": 500_000, "min_pixels": 9000}, (9000, 700_000)),
        ({"min_pixels": 1}, {"max_pixels": 500_000, "min_pixels": 9000}, (1, 500_000)),
        ({"max_pixels": 1000}, None, (1000, 1000)),  # the server's min gives way
        ({}, {"max_pixels": 1000}, (1000, 1000)),
        ({"min_pixels": 1000, "max_pixels": 1000}, None, (1000, 1000)),
    ],
)
def test_limits_in_force(picture, request_kwargs, expected):
    assert in_force(picture, request_kwargs) == expected


def test_low_detail_of_a_server_with_less():
    assert in_force({"detail": "low"}, server=(3136, 50176)) == (3136, 50176)
    assert in_force({"detail": "low"}, server=(LOW + 5, 2 * LOW)) == (LOW, LOW)


@pytest.mark.parametrize(
    ("picture", "request_kwargs", "param", "number"),
    [
        ({"max_pixels": 1003521}, None, "messages[0].content[1].max_pixels", "1003520"),
        ({}, {"max_pixels": 1003521}, "mm_processor_kwargs.max_pixels", "1003520"),
        ({"max_pixels": 784}, {"size": {"longest_edge": 1003521}}, "mm_processor_kwargs.size.longest_edge", "1003520"),
        ({"detail": "low"}, {"max_pixels": 1 << 62}, "mm_processor_kwargs.max_pixels", "1003520"),
        ({"min_pixels": 1003521}, None, "messages[0].content[1].min_pixels", "1003520"),
        ({"min_pixels": 785, "max_pixels": 784}, None, "messages[0].content[1].min_pixels", "784"),
        ({"min_pixels": 784}, {"min_pixels": 785, "max_pixels": 784}, "mm_processor_kwargs.min_pixels", "784"),
        ({}, {"size": {"shortest_edge": 785}, "max_pixels": 784}, "mm_processor_kwargs.size.shortest_edge", "784"),
        ({"min_pixels": 785}, {"max_pixels": 784}, "messages[0].content[1].min_pixels", "784"),
        ({"max_pixels": 784}, {"min_pixels": 785}, "mm_processor_kwargs.min_pixels", "784"),
        ({"min_pixels": LOW + 1, "detail": "low"}, None, "messages[0].content[1].min_pixels", str(LOW)),
    ],
)
def test_limits_that_cannot_be(picture, request_kwargs, param, number):
    with pytest.raises(RequestError, match=number) as refusal:
        in_force(picture, request_kwargs)
    assert (refusal.value.param, refusal.value.status) == (param, 400)


def test_a_request_is_checked_without_pictures():
    with pytest.raises(RequestError):
        make_layout().limits_in_force(processor_settings({"max_pixels": 1 << 40}), [])
    assert make_layout().limits_in_force(NOTHING, []) == []


numbers = st.none() | st.integers(1, 1 << 21)


@settings(max_examples=500, deadline=None)
@given(numbers, numbers, st.sampled_from([None, "low", "high", "auto"]), numbers, numbers)
def test_limits_are_in_order_and_within_the_servers_or_refused(own_min, own_max, detail, all_min, all_max):
    picture = {"detail": detail, "min_pixels": own_min, "max_pixels": own_max}
    try:
        limits = in_force(picture, {"min_pixels": all_min, "max_pixels": all_max})
    except RequestError as refusal:
        assert any(number is not None for number in (own_min, own_max, all_min, all_max))
        assert refusal.status == 400 and refusal.param != "messages"
    else:
        assert 1 <= limits.min_pixels <= limits.max_pixels <= SERVER.max_pixels
        assert limits.max_pixels == own_max or own_max is None
        assert detail != "low" or own_max is not None or limits.max_pixels <= LOW


def test_every_number_is_in_the_fingerprint():
    changes = [
        {"min_pixels": 784}, {"max_pixels": 784000}, {"patch_size": 16}, {"merge_size": 4}, {"temporal_patch_size": 1},
        {"resample": 2}, {"image_mean": [0.5] * 3}, {"image_std": [0.5] * 3}, {"rescale_factor": 1.0},
    ]
    layouts = [make_layout(change) for change in [{}, *changes]]
    assert len({layout.fingerprint(layout.limits) for layout in layouts}) == len(changes) + 1


@pytest.mark.parametrize(
    "processor",
    [
        {"resample": 1}, {"resample": "bicubic"}, {"do_resize": False}, {"min_pixels": 2, "max_pixels": 1},
        {"min_pixels": "many"}, {"max_pixels": 0}, {"max_pixels": 1 << 60}, {"size": 3}, {"size": {"longest_edge": [1]}},
        {"patch_size": "14"}, {"patch_size": -14}, {"merge_size": 0}, {"merge_size": 1.5}, {"rescale_factor": "x"},
        {"rescale_factor": 0}, {"image_mean": 0.5}, {"image_mean": ["a", "b", "c"]}, {"image_std": [0.0, 0.1, 0.1]},
        {"image_std": [0.1]},
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(processor):
    with pytest.raises(ConfigError):
        make_layout(processor)


def test_registry(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 50176}))
    assert load_layout(model_config(tmp_path)).limits.max_pixels == 50176
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_pixels": 100352}}))
    assert load_layout(model_config(tmp_path)).limits.max_pixels == 100352  # transformers 5 writes it here, and reads it first
    with pytest.raises(ConfigError, match="'LlavaForConditionalGeneration' is not supported; supported: LlamaForCausalLM, Qwen2"):
        load_layout(model_config(tmp_path, architecture="LlavaForConditionalGeneration", hf_config=IDS))
    with pytest.raises(ConfigError, match="image_token_id"):
        load_layout(model_config(tmp_path, hf_config={}))


def test_layouts_and_models_are_of_the_same_architectures():
    assert {*TextLayout.architectures, *Qwen2VLLayout.architectures} == set(registry._BUILDERS)
    assert not set(TextLayout.architectures) & set(Qwen2VLLayout.architectures)


@pytest.mark.parametrize(
    ("vision", "message"), [({"patch_size": 16}, "patch_size 14"), ({"spatial_merge_size": 3}, "merge_size 2")]
)
def test_pictures_cut_up_otherwise_than_the_tower_takes_them_are_refused(tmp_path, vision, message):
    with pytest.raises(ConfigError, match=f"{message} where config.json has"):
        load_layout(model_config(tmp_path, hf_config={**IDS, "vision_config": vision}))


def test_a_model_of_text_alone_has_nothing_to_hold_pictures(tmp_path):
    layout = load_layout(model_config(tmp_path, architecture="LlamaForCausalLM", hf_config={}))
    assert (layout.takes_images, layout.image_token_id) == (False, None)
    assert (layout.max_image_tokens(4096), layout.image_bytes(9)) == (0, 0)
