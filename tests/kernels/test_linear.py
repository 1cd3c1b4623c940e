"""The skinny product: any tile, any split; how one is chosen."""

from __future__ import annotations

import pytest
import torch

from mmv1.kernels.linear import SkinnyConfig, skinny_config, skinny_linear, skinny_partial
from tests.kernels import contract

DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 1e-2) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize(
    "config", [(16, 16, 1, 1, 2), (32, 16, 1, 4, 3), (16, 32, 3, 2, 2), (64, 16, 8, 4, 4), (16, 128, 2, 4, 2)]
)
def test_every_tile_and_split_gives_the_product(config: tuple[int, ...], tokens: int) -> None:
    """75 rows of 165 columns: no tile fits, and the last programs of a split have little or nothing left."""
    torch.manual_seed(0)
    setting = contract.Setting(contract, DEVICE, DTYPE, rounds=True)  # for its tensors alone
    x, bias = setting.random(tokens, 165), setting.random(1, 75)[0]
    weight = torch.full((77, 165), float("nan"), device=DEVICE, dtype=DTYPE)[1:-1]
    weight.copy_(torch.randn(75, 165, device=DEVICE).div_(13))
    exact = x.float() @ weight.float().T
    with contract.poisoned_outputs():
        parts = skinny_partial(x, weight, SkinnyConfig(*config))
        result = skinny_linear(x, weight, bias, SkinnyConfig(*config))
    assert parts.shape == ((config[2], tokens, 75) if config[2] > 1 else (tokens, 75))
    contract.check_partial(parts, exact, DTYPE)
    torch.testing.assert_close(result.float(), exact + bias.float(), rtol=TOLERANCE, atol=TOLERANCE)


def test_rows_past_the_tokens_do_not_matter() -> None:
    """A product of one token is the same to the bit whatever else is multiplied beside it."""
    config = SkinnyConfig(16, 32, 2, 1, 2)
    x, weight = torch.randn(16, 64, device=DEVICE, dtype=DTYPE), torch.randn(48, 64, device=DEVICE, dtype=DTYPE)
    together = skinny_partial(x, weight, config)
    for tokens in (1, 7):
        assert torch.equal(skinny_partial(x[:tokens], weight, config), together[:, :tokens])


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584), (2560, 2048), (2048, 11008), (64, 48), (1, 16)],
)
def test_a_configuration_for_every_weight(rows: int, width: int, partial: bool) -> None:
    config = skinny_config(rows, partial=partial)
    assert config == skinny_config(rows, partial=partial)
    assert partial or config.split_k == 1  # nobody would add the parts
    stages_bytes = (config.num_stages - 1) * (config.block_n + 16) * config.block_k * 2
    assert stages_bytes <= 100 << 10  # two programs at least on each multiprocessor
    steps = -(-width // (config.block_k * config.split_k))
    assert width < 256 or (config.split_k - 1) * steps * config.block_k < width  # no program of a real model without work
