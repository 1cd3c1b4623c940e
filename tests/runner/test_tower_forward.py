"""Recorded batches of pictures: padded to a size. Their embeddings must be those of batches launched at their own size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tests.interpreter  # noqa: F401
from mmv1.runner.attention.triton import TritonBackend
from mmv1.runner.platform import Platform
from mmv1.runner.tower_forward import TowerForward
from tests.runner.driver import Driver, Picture, make_picture, patch_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted only where there is no GPU")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_recorded_batches_embed_as_launched_ones(
    make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """One picture and several, of borders that no window fills, one after another through the same recordings."""
    driver = make_driver(family)
    model, launched = driver.worker.model, driver.worker._tower
    recorded = TowerForward(model, Platform(), TritonBackend())
    with torch.inference_mode():
        recorded.record([64, 128])
        laid_out = model.lay_out_images
        monkeypatch.setattr(model, "lay_out_images", lambda *args: sizes.append(args[2:]) or laid_out(*args))
        for shapes, size in (([(5, 3)], 64), ([(1, 1)], 64), ([(3, 4), (2, 1), (1, 9)], 128), ([(2, 2)], 64), ([(6, 6)], None)):
            pictures = [make_picture(*shape, patch=patch_of(family)) for shape in shapes]
            sizes: list[tuple[int, ...]] = []
            got = embed(recorded, pictures).clone()
            assert sizes[-1] == (() if size is None else (size,))
            torch.testing.assert_close(got, embed(launched, pictures), atol=1e-4, rtol=1e-4)


def embed(tower: TowerForward, pictures: list[Picture]) -> torch.Tensor:
    patches = torch.cat([torch.from_numpy(picture.patches) for picture in pictures])
    return tower([picture.grid_thw for picture in pictures], target_of(patches))


@pytest.mark.parametrize("num_patches", [3, 4 * 33])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_layout_that_does_not_fit_is_none(make_driver: Callable[..., Driver], family: str, num_patches: int) -> None:
    """Too few patches; more pictures than there is room for."""
    driver = make_driver(family)
    grids = [(1, 2, 2)] * 33
    assert driver.worker.model.lay_out_images(grids, TritonBackend(), num_patches) is None


def target_of(patches: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def send(target: torch.Tensor) -> None:
        target.copy_(patches)

    return send
