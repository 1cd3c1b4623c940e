"""What a script may write of a picture's size, in each spelling; what is wrong is named."""

import pytest

from mmv1.errors import RequestError
from mmv1.preprocess.image_settings import NOTHING_SAID, picture_settings, processor_settings


def test_beside_a_picture():
    settings = picture_settings({"detail": "low", "min_pixels": 5, "max_pixels": 9}, "messages[2].content[1]")
    assert (settings.detail, settings.min_pixels, settings.max_pixels) == ("low", 5, 9)
    assert (settings.min_param, settings.max_param) == ("messages[2].content[1].min_pixels", "messages[2].content[1].max_pixels")


@pytest.mark.parametrize(
    ("kwargs", "numbers", "params"),
    [
        ({"min_pixels": 5, "max_pixels": 9}, (5, 9), ("min_pixels", "max_pixels")),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}}, (5, 9), ("size.shortest_edge", "size.longest_edge")),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}, "max_pixels": 8}, (5, 8), ("size.shortest_edge", "max_pixels")),
        ({"min_pixels": 5, "size": None}, (5, None), ("min_pixels", "size.longest_edge")),
    ],
)
def test_mm_processor_kwargs(kwargs, numbers, params):
    settings = processor_settings(kwargs)
    assert (settings.min_pixels, settings.max_pixels, settings.detail) == (*numbers, None)
    assert (settings.min_param, settings.max_param) == tuple(f"mm_processor_kwargs.{param}" for param in params)


def test_none_says_nothing():
    assert processor_settings(None) == NOTHING_SAID


WRONG = [
    ({"max_pixel": 5}, "max_pixel"), ({"resized_height": 28}, "resized_height"), ({"max_pixels": 0}, "max_pixels"),
    ({"max_pixels": "9"}, "max_pixels"), ({"min_pixels": 1.5}, "min_pixels"), ({"min_pixels": True}, "min_pixels"),
    ({"min_pixels": 10**4000}, "min_pixels"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "name"), [*WRONG, ({"detail": "tiny"}, "detail"), ({"detail": 1}, "detail")])
def test_what_is_wrong_beside_a_picture_is_named(said, name):
    with pytest.raises(RequestError, match=name) as refusal:
        picture_settings(said, "messages[0].content[0]")
    assert refusal.value.param == "messages[0].content[0]"
    assert len(refusal.value.message) < 200


@pytest.mark.parametrize(
    ("kwargs", "name"), [*WRONG, ({"detail": "low"}, "detail"), ({"size": {"height": 5}}, "height"), ({"size": 5}, "size")]
)
def test_a_wrong_processor_setting_is_named(kwargs, name):
    with pytest.raises(RequestError, match=name) as refusal:
        processor_settings(kwargs)
    assert refusal.value.param == "mm_processor_kwargs"


@pytest.mark.parametrize("kwargs", [5, "low", [("max_pixels", 5)]])
def test_what_is_no_mapping_is_refused(kwargs):
    with pytest.raises(RequestError):
        processor_settings(kwargs)
