"""Attention backends on the CPU, the kernels of Triton interpreted; and the arithmetic of tiles and splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmv1.errors import ConfigError
from mmv1.kernels.flash_tile import padded_head_dim
from mmv1.runner.attention import flash, installed_backends, make_backend, triton
from mmv1.runner.attention.flash import FlashFunctions
from mmv1.runner.attention.triton import (
    StepLayout,
    TileLayout,
    choose_num_splits,
    cumulative,
    make_tiles,
    small_tile_tokens,
    tile_layouts,
)
from tests.runner.attention_suite import (  # noqa: F401
    SCALE,
    Setting,
    Shape,
    make_case,
    make_tile_plan,
    reference,
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

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")


def make_setting(name: str) -> Setting:
    return Setting(make_backend(name, CPU, torch.float32), CPU, torch.float32, Shape(6, 2, 16, 4))


@pytest.fixture(params=["sdpa", "triton"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return make_setting(request.param)


@pytest.fixture
def triton_setting() -> Setting:
    return make_setting("triton")


def test_tiles_cut_every_requests_tokens() -> None:
    rows, starts, query_lens, computed = (np.array(x) for x in ([7, 2, 5], [0, 5, 6], [5, 1, 4], [10, 33, 0]))
    tiles = make_tiles(rows, starts, query_lens, computed, 2, num_tiles=8)
    assert tiles.dtype == np.int32
    assert tiles.T.tolist() == [
        [7, 0, 2, 10], [7, 2, 2, 12], [7, 4, 1, 14], [2, 5, 1, 33], [5, 6, 2, 0], [5, 8, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    assert make_tiles(rows, starts, query_lens, computed, 2).shape == (4, 6)
    with pytest.raises(ValueError, match="6 tiles are needed, there is room for 5"):
        make_tiles(rows, starts, query_lens, computed, 2, num_tiles=5)


def test_as_many_tokens_make_a_small_tile_as_fit_its_rows() -> None:
    assert [small_tile_tokens(group) for group in (1, 2, 7, 8, 9, 16)] == [16, 8, 2, 2, 1, 1]


def test_splits_keep_the_device_busy_and_are_worth_their_sum() -> None:
    assert choose_num_splits(num_tiles=512, num_kv_heads=4, max_seq_len=32768, num_sms=132) == 1  # busy without
    assert choose_num_splits(num_tiles=64, num_kv_heads=2, max_seq_len=32768, num_sms=132) == 3
    assert choose_num_splits(num_tiles=8, num_kv_heads=4, max_seq_len=32768, num_sms=132) == 12
    assert choose_num_splits(num_tiles=8, num_kv_heads=4, max_seq_len=1500, num_sms=132) == 11  # 128 keys each at least
    assert choose_num_splits(num_tiles=1, num_kv_heads=4, max_seq_len=100, num_sms=132) == 1
    assert choose_num_splits(num_tiles=1, num_kv_heads=1, max_seq_len=1 << 20, num_sms=132) == 64  # no end of it otherwise


def test_a_recorded_step_leaves_long_decodes_beside_chunks_to_launches_that_split_their_keys(triton_setting: Setting) -> None:
    case = make_case(triton_setting, [(0, 3)])
    layout = triton_setting.backend.layout(3, case.metadata.block_table, 4, case.query)
    assert layout is not None
    steps = [([1, 500], [3072, 90_000]), ([1, 500], [3073, 600]), ([2, 500], [90_000, 600]), ([1] * 4, [9] * 4)]
    assert [layout.fits(*map(np.array, step)) for step in steps] == [True, False, True, False]


def test_one_long_request_among_short_ones_is_read_in_more_parts() -> None:
    table, output = torch.zeros(64, 8, dtype=torch.int32), torch.zeros(64, 28, 128)
    few = TileLayout(64, table, 16, 2, 2, output, takes_uneven=False)
    many = TileLayout(64, table, 16, 2, 16, output)
    ones = np.ones(64, dtype=np.int64)
    one_long = np.array([4097, *[1000] * 63])
    steps = [(ones, ones * 1500), (ones, ones * 100_000), (ones, one_long), (ones, one_long - 1)]
    assert [few.fits(*step) for step in steps] == [True, True, False, True]
    assert all(many.fits(*step) for step in steps)


@pytest.mark.parametrize(
    ("num_tiles", "most_keys", "splits"),
    [(64, 32_768, [1, 16]), (1, 32_768, [64]), (64, 2048, [1]), (32, 32_768, [3, 16]), (8, 131_072, [12])],
)
def test_a_size_is_laid_out_twice_where_a_request_can_make_it_uneven(
    monkeypatch: pytest.MonkeyPatch, num_tiles: int, most_keys: int, splits: list[int]
) -> None:
    monkeypatch.setattr(triton, "num_multiprocessors", lambda device: 132)
    table, output = torch.zeros(2, most_keys // 16, dtype=torch.int32), torch.zeros(num_tiles, 28, 128)
    assert [layout._plan.num_splits for layout in tile_layouts(num_tiles, 4, table, 16, output)] == splits


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), ["triton", "sdpa"]), ((9, 0), ["flash", "triton", "sdpa"]), ((10, 3), ["flash", "triton", "sdpa"]),
        ((12, 0), ["triton", "sdpa"]),
    ],
)
def test_flash_is_for_devices_on_which_it_has_a_paged_cache(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash, "is_installed", lambda: True)
    assert installed_backends(torch.device("cuda", 0), torch.bfloat16) == expected
    assert installed_backends(torch.device("cuda", 0), torch.float32) == ["triton", "sdpa"]


def test_no_product_has_as_few_columns_as_are_compiled_wrongly() -> None:
    assert [padded_head_dim(head_dim) for head_dim in (8, 16, 17, 64, 72, 80, 128)] == [32, 32, 32, 64, 128, 128, 128]


def test_large_tiles_are_refused_where_no_kernel_takes_them(triton_setting: Setting) -> None:
    case = make_case(triton_setting, [(0, 3)])
    plan = make_tile_plan(case, 129, 1)
    with pytest.raises(ValueError, match="tiles of 129 tokens are too large"):
        triton_setting.backend.forward(case.query, case.key, case.value, case.kv_cache, plan, 1.0)


def test_flash_leaves_heads_that_are_not_whole_words_to_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package reads 16 bytes at a time: heads of 20 numbers of bfloat16 do not begin at multiples of that."""
    calls: list[int] = []
    package = FlashFunctions(lambda *_: pytest.fail("paged"), True, lambda query, *_: calls.append(query.shape[-1]) or query)
    monkeypatch.setattr(flash, "load", lambda: package)
    backend = flash.FlashBackend()
    seqlens = [70, 9]
    plan = backend.plan_varlen(seqlens, CPU)._replace(cu_seqlens=cumulative(seqlens, CPU))  # as on CUDA
    for head_dim in (24, 20):
        query, key, value = torch.randn(79, 6, head_dim, generator=torch.Generator().manual_seed(0)).split(2, dim=1)
        result = backend.varlen(query, key, value, plan, SCALE)
    assert calls == [24]
    parts = zip(*(x.split(seqlens) for x in (query, key, value)), strict=True)
    torch.testing.assert_close(result, torch.cat([reference(q, k, v, None) for q, k, v in parts]))


def test_flash_leaves_long_blocks_to_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block as long as the package's tile is read whole, with the NaN that nobody has written over."""
    package = FlashFunctions(lambda *_: pytest.fail("paged"), True, lambda *_: pytest.fail("segments"))
    monkeypatch.setattr(flash, "load", lambda: package)
    setting = Setting(flash.FlashBackend(), CPU, torch.float32, Shape(6, 2, 16, 128))
    case = make_case(setting, [(140, 1), (0, 33), (31, 2)])
    setting.assert_close(case.run(setting.backend), case.expected)
    assert isinstance(setting.backend.layout(4, case.metadata.block_table, 128, case.query), StepLayout)


@pytest.mark.parametrize("can_be", [True, False])
def test_flash_is_recorded_where_it_writes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, can_be: bool) -> None:
    package = FlashFunctions(lambda *_: pytest.fail("paged"), can_be, lambda *_: pytest.fail("segments"))
    monkeypatch.setattr(flash, "load", lambda: package)
    layout = flash.FlashBackend().layout(4, torch.zeros(4, 8, dtype=torch.int32), 16, torch.zeros(640, 4, 16))
    assert (layout is not None) == can_be
    if layout is not None:
        assert [layout.fits(np.full(count, 9), np.full(count, 90_000)) for count in (1, 4, 5)] == [True, True, False]


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention backend 'abacus'; there are: flash, sdpa, triton"):
        make_backend("abacus", CPU)


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'flash' cannot run here; what can: sdpa"):
        make_backend("flash", CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert installed_backends(CPU, torch.float32) == ["sdpa"]


def test_without_a_name_the_best_there_is_is_chosen() -> None:
    assert make_backend(None, CPU).name == "sdpa"
