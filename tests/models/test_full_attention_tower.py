"""The towers of Qwen2-VL and Qwen3-VL against transformers', for grids of every kind: every level of an embedding by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from mmv1.models.full_attention_tower import interpolation_taps
from mmv1.models.language_model import LanguageModel
from mmv1.models.layers.vision import patch_coordinates
from tests.models.test_qwen2_5_vision import SIZES, encode
from tests.oracle import HFOracle
from tests.runner.driver import Picture, make_picture, patch_of

FAMILIES = ["qwen2_vl", "qwen3_vl"]
Models = Callable[[str], LanguageModel]
Oracles = Callable[[str], HFOracle]


def reference(oracle: HFOracle, pictures: list[Picture]) -> list[torch.Tensor]:
    """The levels of these pictures' embeddings, [tokens, width] each."""
    images = [torch.from_numpy(picture.pixels).permute(2, 0, 1) for picture in pictures]
    inputs = oracle.processor.image_processor(images, do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        output = oracle.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]


def assert_equal_levels(model: LanguageModel, oracle: HFOracle, pictures: list[Picture]) -> None:
    expected = reference(oracle, pictures)
    levels = encode(model, pictures).split(expected[0].shape[1], dim=1)
    for mine, theirs in zip(levels, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_transformers(tiny_models: Models, hf_oracles: Oracles, family: str, size: tuple[int, int]) -> None:
    assert_equal_levels(tiny_models(family), hf_oracles(family), [make_picture(*size, patch=patch_of(family))])


@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_in_one_call(tiny_models: Models, hf_oracles: Oracles, family: str) -> None:
    sizes = [*SIZES, SIZES[3], SIZES[0]]
    pictures = [make_picture(*size, seed=i, patch=patch_of(family)) for i, size in enumerate(sizes)]
    assert_equal_levels(tiny_models(family), hf_oracles(family), pictures)


def test_there_are_levels_and_they_differ(tiny_models: Models) -> None:
    assert len(encode(tiny_models("qwen2_vl"), [make_picture(2, 3)]).split(64, dim=1)) == 1
    levels = encode(tiny_models("qwen3_vl"), [make_picture(2, 3, patch=16)]).split(64, dim=1)
    assert len(levels) == 4
    assert not any(torch.allclose(levels[i], levels[j], atol=0.1) for i in range(4) for j in range(i))


@pytest.mark.parametrize("side", [8, 48])
@pytest.mark.parametrize("size", [*SIZES, (4, 7), (24, 24), (40, 33)])
def test_the_table_of_positions_is_stretched_as_transformers_does(size: tuple[int, int], side: int) -> None:
    """The same rows with the same weights, to the last bit; for a picture smaller than the table, as large, and larger."""
    height, width = 2 * size[0], 2 * size[1]
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, height, width]]), num_grid_per_side=side, align_corners=True, spatial_merge_size=2
    )
    taps, tap_weights = interpolation_taps(patch_coordinates(height, width, 2), (height, width), side)
    np.testing.assert_array_equal(taps, indices.numpy())
    np.testing.assert_array_equal(tap_weights, weights.numpy())


def test_pixels_equal_the_image_processors(tiny_models: Models, hf_oracles: Oracles) -> None:
    """Qwen3-VL has a mean and a deviation of its own: every value a channel can have, to the last bit."""
    picture = Picture(np.resize(np.arange(256, dtype=np.uint8)[:, None, None], (288, 32, 3)), patch=16)
    image = torch.from_numpy(picture.pixels).permute(2, 0, 1)
    processor = hf_oracles("qwen3_vl").processor.image_processor
    expected = processor([image], do_resize=False, return_tensors="pt")["pixel_values"]
    patches = torch.from_numpy(picture.patches)
    got = tiny_models("qwen3_vl").visual.patch_embed.normalize(patches, torch.arange(len(patches) // 4))
    both_frames = got.unflatten(-1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)
    assert torch.equal(both_frames, expected)
