"""The contract of tests/kernels at the sizes of Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's models and of their vision towers, in
bfloat16 on the device: plain torch there, and the fused kernels, whose numbers are moreover those of transformers' separate
operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mmv1.kernels import fused, plain
from mmv1.kernels.sampling import gumbel_argmax
from mmv1.runner.platform import Platform
from mmv1.runner.sampler import Sampler
from tests.kernels import contract
from tests.kernels.contract import Setting

pytestmark = pytest.mark.gpu

SETTINGS = {
    "plain": Setting(plain, "cuda", torch.bfloat16, rounds=True),
    "fused": Setting(fused, "cuda", torch.bfloat16, rounds=True, like_transformers=True),
    "fused float32": Setting(fused, "cuda", torch.float32, rounds=True),
}
ROWS = [1, 3, 64, 1021]
HIDDEN = [3584, 2048, 1280]


@pytest.fixture(autouse=True)
def exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS adds the parts of a split product in float32 here; by default it may do so in bfloat16."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    torch.manual_seed(0)
    with contract.poisoned_outputs():
        yield request.param


@pytest.mark.parametrize("width", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_norms(setting: Setting, rows: int, width: int) -> None:
    contract.check_rms_norm(setting, rows, width)
    contract.check_add_rms_norm(setting, rows, width)
    for parts in (1, 2, 7):
        contract.check_add_rms_norm_of_parts(setting, parts, rows, width)


@pytest.mark.parametrize("width", [1152, 1280, 4608])
@pytest.mark.parametrize("rows", ROWS)
def test_layer_norms(setting: Setting, rows: int, width: int) -> None:
    contract.check_layer_norm(setting, rows, width)
    contract.check_add_layer_norm(setting, rows, width)
    for parts in (1, 2, 7):
        contract.check_add_layer_norm_of_parts(setting, parts, rows, width)


@pytest.mark.parametrize("width", [18944, 11008, 3456])
@pytest.mark.parametrize("rows", ROWS)
def test_silu_and_mul(setting: Setting, rows: int, width: int) -> None:
    contract.check_silu_and_mul(setting, rows, width)


@pytest.mark.parametrize("width", [5120, 3456])
@pytest.mark.parametrize("rows", ROWS)
def test_quick_gelu(setting: Setting, rows: int, width: int) -> None:
    contract.check_quick_gelu(setting, rows, width)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (16, 2), (16, 4), (28, 8)])
@pytest.mark.parametrize("rows", ROWS)
def test_rotate_and_store(setting: Setting, rows: int, heads: int, kv_heads: int, norm: bool) -> None:
    contract.check_rotate_and_store(setting, rows, heads, kv_heads, 128, norm=norm)
    contract.check_rotate_and_store(setting, rows, heads, kv_heads, 128, norm=norm, angles=torch.float32)


@pytest.mark.parametrize("rows", ROWS)
def test_rotate_in_place(setting: Setting, rows: int) -> None:
    contract.check_rotate_(setting, rows, 32, 80)


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("width", HIDDEN[:2])
@pytest.mark.parametrize("rows", ROWS)
def test_embed(setting: Setting, rows: int, width: int, levels: int) -> None:
    contract.check_embed(setting, rows, 152064, width, levels)


@pytest.mark.parametrize("width", [1152, 1024])
@pytest.mark.parametrize("rows", ROWS)
def test_add_interpolated(setting: Setting, rows: int, width: int) -> None:
    contract.check_add_interpolated(setting, rows, 2304, width)


@pytest.mark.parametrize("padded_width", [588, 592])
@pytest.mark.parametrize("units", [1, 1369])
def test_normalize_patches(setting: Setting, units: int, padded_width: int) -> None:
    contract.check_normalize_patches(setting, units, 4, 3, 196, padded_width)


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584), (2560, 2048), (2048, 2048), (22016, 2048),
     (2048, 11008), (151936, 2048)],
)  # fmt: skip
def test_linear(ops: object, tokens: int, rows: int, width: int) -> None:
    torch.manual_seed(0)
    with contract.poisoned_outputs():
        contract.check_linear(Setting(ops, "cuda", torch.bfloat16, rounds=True), tokens, rows, width)  # type: ignore[arg-type]


def test_products_repeat_to_the_bit() -> None:
    x, weight = (torch.randn(rows, 18944, device="cuda", dtype=torch.bfloat16) for rows in (5, 3584))
    first = fused.linear_partial(x, weight)
    assert all(torch.equal(fused.linear_partial(x, weight), first) for _ in range(10))
    assert torch.equal(fused.linear_partial(x[2:3], weight)[..., 0, :], first[..., 2, :])


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (512, 10), (60, 16)])
@pytest.mark.parametrize("rows", ROWS)
def test_route(setting: Setting, rows: int, num_experts: int, top_k: int) -> None:
    contract.check_route(setting, rows, num_experts, top_k)


@pytest.mark.parametrize(("hidden", "width"), [(2048, 768), (1000, 360)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 65, 512, 513, 1021])
def test_experts(setting: Setting, tokens: int, hidden: int, width: int) -> None:
    contract.check_experts(setting, tokens, 128, 8, hidden, width)


@pytest.mark.parametrize("tokens", [8, 100, 1000])
def test_recorded_experts_follow_their_tokens(tokens: int) -> None:
    """One recording, replayed for other tokens that choose other experts: nothing of the first choice is left in it."""
    torch.manual_seed(0)
    make: Any = {"device": "cuda", "dtype": torch.bfloat16}
    gate_up, down = torch.randn(64, 512, 256, **make) / 16, torch.randn(64, 256, 256, **make) / 16
    x, logits = torch.randn(tokens, 256, **make), torch.randn(tokens, 64, **make)

    def compute() -> torch.Tensor:
        return fused.experts(x, gate_up, down, *fused.route(logits, 6, True))

    compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = compute()
    for favourite in (None, 0, 63):
        x.normal_()
        logits.normal_()
        if favourite is not None:
            logits[:, favourite] = 9.0
        graph.replay()
        assert torch.equal(recorded, compute())


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_whole_vocabulary_is_drawn_from_as_by_torch(rows: int) -> None:
    vocab = 152064
    torch.manual_seed(rows)
    logits = (torch.randn(rows, vocab, device="cuda") * 3).bfloat16()
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), device="cuda")
    temperature = torch.rand(rows, device="cuda") * 2 + 0.05
    noise = Sampler(Platform(), vocab)._log_exponential(keys)
    drawn = gumbel_argmax(logits, temperature, keys)
    assert torch.equal(drawn, (logits.float() / temperature.unsqueeze(1) - noise).argmax(dim=-1))
    assert torch.equal(gumbel_argmax(logits, torch.zeros_like(temperature), keys), logits.argmax(dim=-1))


def test_numbers_of_tokens_compile_nothing() -> None:
    """Kernels met once are not compiled again for another number of tokens, nor for where in a buffer its numbers lie."""
    from mmv1.kernels import embedding, linear, moe, norm, rotary, sampling

    kernels = [embedding._embed_kernel, linear._skinny_kernel, linear._sum_parts_kernel, norm._add_rms_norm_kernel,
               norm._rms_norm_kernel, rotary._rotate_and_store_kernel, sampling._draw_parts_kernel, moe._route_kernel,
               moe._count_kernel, moe._sort_kernel, moe._gate_up_kernel, moe._down_kernel, moe._sum_kernel]  # fmt: skip
    weight, table = torch.ones(256, device="cuda", dtype=torch.bfloat16), torch.ones(64, 256, device="cuda", dtype=torch.bfloat16)
    cache = torch.zeros(2, 8, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    numbers = torch.arange(64, device="cuda", dtype=torch.int32)
    matrix = torch.ones(48, 256, device="cuda", dtype=torch.bfloat16)
    gate_up, down = table.expand(4, -1, -1), torch.ones(4, 256, 32, device="cuda", dtype=torch.bfloat16)

    def step(tokens: int, start: int) -> None:
        places = numbers[start : start + tokens]
        hidden = fused.embed(places, table, places - 20, table)
        parts = torch.ones(3, tokens, 256, device="cuda")
        fused.add_rms_norm(parts, hidden, weight, 1e-6)
        fused.rms_norm(hidden, weight, 1e-6)
        fused.experts(hidden, gate_up, down, *fused.route(hidden[:, :4], 2, True))
        angles = torch.ones(tokens, 32, device="cuda", dtype=torch.bfloat16)
        fused.rotate_and_store(hidden.view(tokens, 4, 64).repeat(1, 2, 1), 2, angles, angles, places, cache)
        if tokens <= linear.MAX_SKINNY_TOKENS:
            config = linear.SkinnyConfig(16, 64, 2, 2, 2)
            linear.skinny_linear(hidden, matrix, None, config)
        gumbel_argmax(hidden, torch.ones(64, device="cuda")[start : start + tokens], numbers.long()[start : start + tokens])

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    step(3, 1)
    step(20, 1)  # experts sort what one block does not take
    before = compiled()
    assert before >= len(kernels)
    for tokens, start in ((1, 0), (16, 16), (2, 3), (33, 5), (17, 1)):
        step(tokens, start)
    assert compiled() == before
