"""The vision tower against transformers', for grids of every kind, and its pixels against the image processor's."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch

from mmv1.models.interface import GridTHW
from mmv1.models.language_model import LanguageModel
from mmv1.models.layers.vision import GridCache
from mmv1.runner.attention.sdpa import SDPABackend
from tests.oracle import HFOracle
from tests.runner.driver import Picture, make_picture

# In merge units. A window is 4 x 4 of them: single unit, less than a window, exactly one, one and a bit, long and thin, large.
SIZES = [(1, 1), (1, 2), (3, 2), (4, 4), (5, 4), (4, 5), (5, 5), (8, 8), (1, 30), (30, 1), (2, 17), (9, 7), (13, 3), (16, 12)]


def reference(oracle: HFOracle, picture: Picture) -> torch.Tensor:
    image = torch.from_numpy(picture.pixels).permute(2, 0, 1)
    inputs = oracle.processor.image_processor([image], do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        return oracle.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output


def encode(model: LanguageModel, pictures: list[Picture]) -> torch.Tensor:
    patches = torch.from_numpy(np.concatenate([p.patches for p in pictures]))
    grids: list[GridTHW] = [p.grid_thw for p in pictures]
    with torch.inference_mode():
        attention = SDPABackend()
        return model.encode_images(patches, model.lay_out_images(grids, attention), attention)


@pytest.mark.parametrize("size", SIZES)
def test_embeddings_equal_transformers(tiny_model: LanguageModel, hf_oracle: HFOracle, size: tuple[int, int]) -> None:
    picture = make_picture(*size)
    torch.testing.assert_close(encode(tiny_model, [picture]), reference(hf_oracle, picture), atol=1e-4, rtol=1e-4)


def test_several_pictures_in_one_call_equal_one_by_one(tiny_model: LanguageModel) -> None:
    pictures = [make_picture(*size, seed=i) for i, size in enumerate([*SIZES, SIZES[3], SIZES[0]])]
    one_by_one = torch.cat([encode(tiny_model, [picture]) for picture in pictures])
    torch.testing.assert_close(encode(tiny_model, pictures), one_by_one, atol=1e-4, rtol=1e-4)


def test_pixels_equal_the_image_processors(tiny_model: LanguageModel, hf_oracle: HFOracle) -> None:
    """Every value a channel can have, to the last bit."""
    values = np.arange(256, dtype=np.uint8)
    picture = Picture(np.resize(values[:, None, None], (280, 28, 3)))
    image = torch.from_numpy(picture.pixels).permute(2, 0, 1)
    expected = hf_oracle.processor.image_processor([image], do_resize=False, return_tensors="pt")["pixel_values"]
    patches = torch.from_numpy(picture.patches)
    got = tiny_model.visual.patch_embed.normalize(patches, torch.arange(len(patches) // 4))
    assert not got[:, 588:].any()
    got = got[:, :588]
    both_frames = got.unflatten(-1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)
    assert torch.equal(both_frames, expected)


def test_tables_of_a_grid_are_made_once(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tiny_model.visual._tables
    made: list[tuple[int, int]] = []
    make = tables._make
    monkeypatch.setattr(tables, "_make", lambda height, width: made.append((height, width)) or make(height, width))
    monkeypatch.setattr(tables, "_kept", OrderedDict())
    for seed in range(3):
        encode(tiny_model, [make_picture(7, 11, seed)])
    assert made == [(14, 22)]


def test_tables_of_grids_have_a_bound_together() -> None:
    kept: GridCache[tuple[int, int]] = GridCache(lambda height, width: (height, width))
    side = 1 << 9  # half of what is kept
    for height in (side, side + 1, side + 2):
        assert kept(height, side) == (height, side)
    assert list(kept._kept) == [(side + 2, side)] and kept._num_patches == side * (side + 2)
    huge = 1 << 12
    assert kept(huge, huge) == (huge, huge) and list(kept._kept) == [(huge, huge)]  # the newest always
    kept(1, 1)
    assert list(kept._kept) == [(1, 1)] and kept._num_patches == 1
