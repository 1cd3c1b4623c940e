"""Plain and fused operations under one contract, on the CPU: small, odd sizes; fused ones in Triton's interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch

from mmv1 import kernels
from mmv1.kernels import fused, plain
from tests.kernels import contract
from tests.kernels.contract import Setting

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device, tests/gpu does this at real sizes")

SETTINGS = {
    f"{name} {dtype}": Setting(ops, "cpu", dtype, rounds=ops is plain)
    for name, ops in (("plain", plain), ("fused", fused)) for dtype in (torch.float32, torch.bfloat16)
}  # fmt: skip


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    torch.manual_seed(0)
    with contract.poisoned_outputs():
        yield request.param


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 70), (3, 1)])
def test_norms(setting: Setting, rows: int, width: int) -> None:
    contract.check_rms_norm(setting, rows, width)
    contract.check_add_rms_norm(setting, rows, width)
    for parts in (1, 2, 5):
        contract.check_add_rms_norm_of_parts(setting, parts, rows, width)


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 70), (3, 1)])
def test_layer_norms(setting: Setting, rows: int, width: int) -> None:
    contract.check_layer_norm(setting, rows, width)
    contract.check_add_layer_norm(setting, rows, width)
    for parts in (1, 2, 5):
        contract.check_add_layer_norm_of_parts(setting, parts, rows, width)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 1025), (2, 37)])
def test_silu_and_mul(setting: Setting, rows: int, width: int) -> None:
    contract.check_silu_and_mul(setting, rows, width)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 1025), (2, 37)])
def test_quick_gelu(setting: Setting, rows: int, width: int) -> None:
    contract.check_quick_gelu(setting, rows, width)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), [(1, 4, 2, 16), (7, 9, 3, 10), (2, 7, 1, 6)])
def test_rotate_and_store(setting: Setting, rows: int, heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    contract.check_rotate_and_store(setting, rows, heads, kv_heads, head_dim, norm=norm)
    contract.check_rotate_and_store(setting, rows, heads, kv_heads, head_dim, norm=norm, angles=torch.float32)


@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 4, 16), (5, 9, 20)])
def test_rotate_in_place(setting: Setting, rows: int, heads: int, head_dim: int) -> None:
    contract.check_rotate_(setting, rows, heads, head_dim)


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 5, 8), (11, 30, 1030)])
def test_embed(setting: Setting, rows: int, vocab: int, width: int, levels: int) -> None:
    contract.check_embed(setting, rows, vocab, width, levels)


@pytest.mark.parametrize(("rows", "places", "width"), [(1, 4, 8), (7, 25, 1030)])
def test_add_interpolated(setting: Setting, rows: int, places: int, width: int) -> None:
    contract.check_add_interpolated(setting, rows, places, width)


@pytest.mark.parametrize(
    ("units", "unit", "channels", "pixels", "padded"), [(1, 4, 3, 4, 12), (5, 4, 3, 49, 152), (3, 1, 1, 5, 8)]
)
def test_normalize_patches(setting: Setting, units: int, unit: int, channels: int, pixels: int, padded: int) -> None:
    contract.check_normalize_patches(setting, units, unit, channels, pixels, padded)


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
def test_linear(ops: object, tokens: int) -> None:
    """float16, since the interpreter multiplies no bfloat16 matrices."""
    torch.manual_seed(0)
    with contract.poisoned_outputs():
        contract.check_linear(Setting(ops, "cpu", torch.float16, rounds=True), tokens, 75, 530)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 4, 1), (9, 128, 8), (3, 61, 10), (2, 512, 16), (2, 5, 5)])
def test_route(setting: Setting, tokens: int, num_experts: int, top_k: int) -> None:
    contract.check_route(setting, tokens, num_experts, top_k)


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("dtype", "tokens", "num_experts", "top_k"),  # float16, since the interpreter multiplies no bfloat16 matrices
    [(torch.float32, 7, 8, 3), (torch.float32, 20, 4, 2), (torch.float16, 1, 8, 2), (torch.float16, 40, 4, 2),
     (torch.float16, 70, 5, 2), (torch.float16, 520, 3, 1)],
)  # fmt: skip
def test_experts(ops: object, dtype: torch.dtype, tokens: int, num_experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    with contract.poisoned_outputs():
        setting = Setting(ops, "cpu", dtype, rounds=True)  # type: ignore[arg-type]
        contract.check_experts(setting, tokens, num_experts, top_k, hidden=42, width=36)


@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
def test_no_tokens_at_all(ops: object) -> None:
    x, weight = torch.empty(0, 8), torch.ones(8)
    assert ops.rms_norm(x, weight, 1e-6).shape == (0, 8)  # type: ignore[attr-defined]
    assert ops.silu_and_mul(x).shape == (0, 4)  # type: ignore[attr-defined]
    assert [t.shape for t in ops.add_rms_norm(x, x, weight, 1e-6)] == [(0, 8)] * 2  # type: ignore[attr-defined]
    assert ops.layer_norm(x, weight, weight, 1e-6).shape == (0, 8)  # type: ignore[attr-defined]
    assert [t.shape for t in ops.route(x, 2, True)] == [(0, 2)] * 2  # type: ignore[attr-defined]
    matrices = torch.ones(4, 12, 8), torch.ones(4, 8, 6)
    assert ops.experts(x, *matrices, x[:, :2], x[:, :2].int()).shape == (0, 8)  # type: ignore[attr-defined]
    assert ops.quick_gelu(x).shape == (0, 8)  # type: ignore[attr-defined]
    assert [t.shape for t in ops.add_layer_norm(x, x, weight, weight, 1e-6)] == [(0, 8)] * 2  # type: ignore[attr-defined]


def test_both_have_the_same_operations() -> None:
    def operations(ops: object) -> dict[str, inspect.Signature]:
        functions = inspect.getmembers(ops, inspect.isfunction)
        return {name: inspect.signature(function) for name, function in functions if not name.startswith("_")}

    assert operations(plain) == operations(fused)
    assert set(operations(fused)) == set(fused.__all__)


def test_the_device_chooses_unless_plain_torch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(kernels._settings, "fused", True)  # and put back
    assert kernels.ops_for(cpu) is plain and kernels.ops_for(cuda) is fused
    assert kernels.uses_fused(cuda) and not kernels.uses_fused(cpu)
    kernels.disable_fused()
    assert kernels.ops_for(cuda) is plain and not kernels.uses_fused(cuda)
