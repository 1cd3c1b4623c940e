"""Every attention backend this machine has, in the numbers it serves in; and recorded launches that outlive their step."""

from __future__ import annotations

import pytest
import torch

from mmv1.runner.attention import installed_backends, make_backend
from tests.runner.attention_suite import (  # noqa: F401
    SCALE,
    Setting,
    Shape,
    make_case,
    make_tile_plan,
    test_a_request_alone_equals_the_request_among_others,
    test_a_segment_is_not_touched_by_its_neighbours,
    test_block_sizes,
    test_head_dims,
    test_heads,
    test_layers_have_caches_of_their_own_and_keep_what_is_new,
    test_padded_tiles_do_nothing,
    test_segments,
    test_step,
    test_tiles,
    test_with_a_fixed_grid_others_change_no_bit,
)

SHAPES = {"7b": Shape(28, 4, 128, 16), "3b": Shape(16, 2, 128, 16)}


def make_setting(name: str, dtype: torch.dtype, shape: str = "7b") -> Setting:
    device = torch.device("cuda", 0)
    if name not in installed_backends(device, dtype):
        pytest.skip(f"the backend '{name}' is not installed for {dtype}")
    return Setting(make_backend(name, device, dtype), device, dtype, SHAPES[shape])


@pytest.fixture(
    params=[("sdpa", torch.bfloat16), ("triton", torch.bfloat16), ("triton", torch.float32), ("flash", torch.bfloat16)], ids=str
)
def setting(request: pytest.FixtureRequest) -> Setting:
    return make_setting(*request.param)


@pytest.fixture
def triton_setting() -> Setting:
    return make_setting("triton", torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_splits", [1, 8])
def test_a_recorded_launch_serves_other_lengths(shape: str, num_splits: int) -> None:
    """One recording over tensors that are filled anew: fewer requests, other tables, other lengths."""
    setting = make_setting("triton", torch.bfloat16, shape)
    steps = [[(900, 1), (3, 1), (0, 4)], [(1, 1), (0, 8), (300, 1), (64, 2)], [(15, 1)]]
    cases = [make_case(setting, step, seed=i) for i, step in enumerate(steps)]
    first = make_case(setting, [(1000, 1)] * 12)  # as large as any: its tensors are what is recorded
    plan = make_tile_plan(first, 2, num_splits, num_tiles=12)
    query, kv_cache = first.query, first.kv_cache

    def launch() -> torch.Tensor:
        return setting.backend.forward(query, first.key, first.value, kv_cache, plan, SCALE)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = launch()
    for case in cases:
        num_tokens, (rows, blocks) = len(case.query), case.metadata.block_table.shape
        plan.tiles.copy_(make_tile_plan(case, 2, num_splits, num_tiles=12).tiles)
        plan.block_table[:rows, :blocks].copy_(case.metadata.block_table)
        query[:num_tokens].copy_(case.query)
        kv_cache.fill_(float("nan"))
        kv_cache[:, : case.kv_cache.shape[1]].copy_(case.kv_cache)
        output.fill_(float("nan"))
        graph.replay()
        setting.assert_close(output[:num_tokens], case.expected)


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_real_sizes(name: str) -> None:
    """A step of decodes at length, beside prompts; a picture of 5476 patches and its windows."""
    setting = make_setting(name, torch.bfloat16)
    case = make_case(setting, [(1500, 1), (2047, 1), (4096, 1), (0, 1400), (700, 300)])
    setting.assert_close(case.run(setting.backend), case.expected)
    reference = make_setting("sdpa", torch.bfloat16).backend
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5476, 3 * 16, 80, generator=generator).to(setting.device, torch.bfloat16)
    for seqlens in ([5476], [64] * 85 + [36]):
        results = [
            backend.varlen(*qkv.split(16, dim=1), backend.plan_varlen(seqlens, setting.device), SCALE)
            for backend in (setting.backend, reference)
        ]
        setting.assert_close(results[0], results[1].float())
