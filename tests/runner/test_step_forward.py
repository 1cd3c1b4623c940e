"""Recorded steps: padded to a size, attention by tiles. They must not be told apart from steps launched at their own size.

On a CPU a recording is the function itself, and the kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tests.interpreter  # noqa: F401
from examples.tiny_model import VISION_FAMILIES
from mmv1.runner.attention import flash
from mmv1.runner.attention.triton import TritonBackend
from tests.runner.driver import Driver, Prompt, make_picture, make_prompt, patch_of

MakeDriver = Callable[..., Driver]
SIZES = (1, 4, 24)


@pytest.fixture(scope="module")
def prompts(image_token_id: int) -> list[Prompt]:
    return prompts_for("qwen2_5_vl", image_token_id)


def prompts_for(family: str, image_token_id: int) -> list[Prompt]:
    if family not in VISION_FAMILIES:
        return [make_prompt([size], image_token_id=-1, seed=size) for size in (7, 18, 25, 1)]
    picture = partial(make_picture, patch=patch_of(family))
    parts = [[7], [3, picture(3, 2), 9], [12, picture(2, 2, 1), 1, picture(2, 3, 2), 2], [1]]
    return [make_prompt(list(part), image_token_id=image_token_id, seed=i) for i, part in enumerate(parts)]


def answers(driver: Driver, prompts: list[Prompt], *, chunk: int = 1 << 30, depth: int = 1) -> dict[str, list[int]]:
    for i, prompt in enumerate(prompts):
        driver.add(f"r{i}", prompt)
    return driver.run(4, chunk=chunk, depth=depth)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_moe"])
def test_fused_kernels_answer_as_plain_torch(
    make_driver: MakeDriver, image_token_id: int, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The whole model by the kernels a GPU runs: tensors come to them as the model makes them."""
    prompts = prompts_for(family, image_token_id)
    expected = answers(make_driver(family), prompts, chunk=7)
    monkeypatch.setattr("mmv1.kernels.uses_fused", lambda device: True)
    driver = make_driver(family, attention_backend="triton")
    driver.worker._runner.record(SIZES)
    assert answers(driver, prompts, chunk=7) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "depth"), [(1 << 30, 1), (7, 2)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_moe"])
def test_recorded_steps_answer_as_launched_ones(
    make_driver: MakeDriver, image_token_id: int, family: str, chunk: int, depth: int
) -> None:
    """Chunks of 7: mixed steps, some larger than any recording. Whole prompts: larger at first."""
    prompts = prompts_for(family, image_token_id)
    expected = answers(make_driver(family), prompts)
    recorded = make_driver(family)
    recorded.worker._runner.record(SIZES)
    forward = recorded.worker._runner._forward
    replayed: list[int] = []
    replay = forward._replay
    forward._replay = lambda one, inputs: replayed.append(one.size) or replay(one, inputs)  # type: ignore[method-assign]
    assert answers(recorded, prompts, chunk=chunk, depth=depth) == expected
    assert len(replayed) >= 3
    assert set(replayed) <= set(SIZES)


def attend_in_plain_torch(query: torch.Tensor, kv_cache: torch.Tensor, plan: Any, scale: float) -> torch.Tensor:
    """What FlashAttention's function does with a plan, which it reads from the plan's tensors alone."""
    output = torch.full_like(query, float("nan")) if plan.output is None else plan.output
    keys, values = kv_cache.flatten(1, 2).repeat_interleave(query.shape[1] // kv_cache.shape[3], dim=2)
    starts, block_size = plan.query_start_loc.tolist(), kv_cache.shape[2]
    for start, end, seq_len, pages in zip(starts, starts[1:], plan.seq_lens.tolist(), plan.page_table, strict=False):
        places = torch.arange(seq_len)
        slots = pages[places // block_size] * block_size + places % block_size
        sees = places <= torch.arange(seq_len - (end - start), seq_len)[:, None]
        heads = (x.transpose(0, 1) for x in (query[start:end], keys[slots], values[slots]))
        output[start:end] = F.scaled_dot_product_attention(*heads, attn_mask=sees, scale=scale).transpose(0, 1)
    return output


PACKAGE = flash.FlashFunctions(attend_in_plain_torch, True, lambda *_: pytest.fail("a tower attended by it"))


@pytest.mark.parametrize("backend", [flash.FlashBackend, TritonBackend])
@pytest.mark.parametrize("most_requests", [2, 256])
def test_large_steps_are_recorded_where_the_backend_can_be(
    make_driver: MakeDriver,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    most_requests: int,
    backend: type[flash.FlashBackend | TritonBackend],
) -> None:
    """All but the smallest attend as the backend does, with more requests in a step than there is room for too."""
    expected = answers(make_driver(), prompts)
    monkeypatch.setattr(flash, "load", lambda: PACKAGE)
    monkeypatch.setattr("mmv1.runner.step_forward.MOST_TILED", 1)
    monkeypatch.setattr("mmv1.runner.step_forward._MOST_REQUESTS_OF_SMALLER", most_requests)
    monkeypatch.setattr("mmv1.runner.attention.triton._MAX_TILE_KEYS", 0)  # of small steps only
    driver = make_driver()
    driver.worker._runner._forward._backend = backend()
    driver.worker._runner.record((*SIZES, 40))
    forward, replayed = driver.worker._runner._forward, []
    replay = forward._replay
    forward._replay = lambda one, inputs: replayed.append((one.size, len(inputs.rows))) or replay(one, inputs)  # type: ignore[method-assign]
    assert answers(driver, prompts, chunk=7) == expected
    assert max(requests for size, requests in replayed if size > 1) == min(most_requests, 4)
    assert max(size for size, _ in replayed) == (24 if most_requests > 4 else 4)


@pytest.mark.parametrize("is_uneven", [False, True])
def test_uneven_steps_are_replayed_in_more_parts(
    make_driver: MakeDriver, prompts: list[Prompt], image_token_id: int, monkeypatch: pytest.MonkeyPatch, is_uneven: bool
) -> None:
    prompts = [*prompts, make_prompt([70], image_token_id=image_token_id)] if is_uneven else prompts
    expected = answers(make_driver(), prompts)
    monkeypatch.setattr("mmv1.runner.attention.triton._MAX_UNEVEN_KEYS", 0)
    monkeypatch.setattr("mmv1.runner.attention.triton._MOST_UNEVEN", 2.0)
    driver = make_driver()
    driver.worker._runner.record(SIZES)
    forward, splits = driver.worker._runner._forward, []
    replay = forward._replay
    forward._replay = lambda one, inputs: splits.append(one.layout._plan.num_splits) or replay(one, inputs)  # type: ignore[method-assign]
    assert answers(driver, prompts) == expected
    assert set(splits) == {16 if is_uneven else 1}


def test_a_size_is_recorded_once_where_no_request_can_be_that_long(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.worker._runner.record(SIZES)
    assert {size: len(recorded) for size, recorded in driver.worker._runner._forward._recorded.items()} == {1: 1, 4: 1, 24: 1}


def test_the_larger_of_large_steps_have_room_for_more_requests(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "load", lambda: PACKAGE)
    for name, value in {"MOST_TILED": 1, "_SMALLER": 24, "_MOST_REQUESTS_OF_SMALLER": 2, "_MOST_REQUESTS": 3}.items():
        monkeypatch.setattr(f"mmv1.runner.step_forward.{name}", value)
    driver = make_driver()
    driver.worker._runner._forward._backend = flash.FlashBackend()
    driver.worker._runner.record((24, 25))
    recorded = driver.worker._runner._forward._recorded
    lens = np.full(3, 5)
    assert [recorded[size][0].layout.fits(lens, lens) for size in (24, 25)] == [False, True]


def test_a_backend_that_cannot_be_recorded_leaves_large_steps_as_they_are(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmv1.runner.step_forward.MOST_TILED", 4)
    driver = make_driver()
    driver.worker._runner.record(SIZES)
    assert driver.worker._runner._forward._sizes == [1, 4]


@pytest.mark.parametrize("most_tiled", [512, 1])
def test_padding_leaves_the_null_block_finite(
    make_driver: MakeDriver, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, most_tiled: int
) -> None:
    """Even when whatever memory is handed out is full of NaN."""

    def full_of_nan(like: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        size = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        is_float = options.get("dtype", like.dtype).is_floating_point
        return like.new_full(size, float("nan") if is_float else 0, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    monkeypatch.setattr(flash, "load", lambda: PACKAGE)
    monkeypatch.setattr("mmv1.runner.step_forward.MOST_TILED", most_tiled)
    driver = make_driver()
    driver.worker._runner._forward._backend = flash.FlashBackend()
    driver.worker._runner.record([24])
    driver.add("a", prompts[0])
    driver.step({"a": 7})
    null_blocks = torch.stack([cache[:, 0] for cache in driver.worker._runner._forward._kv_caches])
    assert null_blocks.any() and null_blocks.isfinite().all()


def test_a_chunk_with_many_keys_is_not_replayed(
    make_driver: MakeDriver, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmv1.runner.attention.triton._MAX_TILE_KEYS", 0)
    driver = make_driver()
    driver.worker._runner.record(SIZES)
    forward = driver.worker._runner._forward
    monkeypatch.setattr(forward, "_replay", lambda *_: pytest.fail("replayed"))
    driver.add("a", prompts[0])
    driver.step({"a": 7})
