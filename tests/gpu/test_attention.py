"""Every attention backend this machine has, in the numbers it serves in; and recorded launches that outlive their step."""

from __future__ import annotations

import numpy as np
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["flash", "triton"])
def test_a_recorded_layout_serves_other_steps(name: str, shape: str) -> None:
    """More room than requests, fewer tokens than room; rows of no request stay as they were."""
    setting = make_setting(name, torch.bfloat16, shape)
    steps = [[(900, 1), (3, 1), (0, 400)], [(0, 130), (1, 1), (300, 260), (64, 2)], [(1000, 640)], [(4000, 3), (15, 1)],
             [(7 * i, 1 + i % 9) for i in range(128)]]  # fmt: skip
    cases = [make_case(setting, step, seed=i) for i, step in enumerate(steps)]
    size, most_requests = 640, 128
    query = torch.zeros(size, *cases[0].query.shape[1:], dtype=torch.bfloat16, device=setting.device)
    most_blocks = max(case.kv_cache.shape[1] for case in cases)
    kv_cache = torch.zeros(2, most_blocks, *cases[0].kv_cache.shape[2:], dtype=torch.bfloat16, device=setting.device)
    table = torch.zeros(300, 512, dtype=torch.int32, device=setting.device)
    output = torch.zeros_like(query)
    layout = setting.backend.layout(most_requests, table, cases[0].metadata.block_size, output)
    assert layout is not None
    numbers = torch.zeros(layout.num_numbers, dtype=torch.int32, device=setting.device)

    def launch() -> None:
        setting.backend.forward(query, query, query, kv_cache, layout.plan(numbers), SCALE)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for case in cases:
        metadata, num_tokens = case.metadata, len(case.query)
        rows, blocks = metadata.block_table.shape
        table[:rows, :blocks].copy_(metadata.block_table)
        host = np.empty(layout.num_numbers, dtype=np.int32)
        layout.write(host, metadata.host_rows, metadata.query_lens, metadata.seq_lens - metadata.query_lens)
        numbers.copy_(torch.from_numpy(host))
        query.fill_(float("nan"))[:num_tokens].copy_(case.query)
        kv_cache.fill_(float("nan"))[:, : case.kv_cache.shape[1]].copy_(case.kv_cache)
        output.fill_(7.0)
        graph.replay()
        setting.assert_close(output[:num_tokens], case.expected)
        assert (output[num_tokens:] == 7.0).all()


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
