"""The experts' kernels: any tile gives the products, a token's numbers are its own, and nobody is left out or doubled."""

from __future__ import annotations

import pytest
import torch

from mmv1.kernels import plain
from mmv1.kernels.moe import ExpertsTiles, _sort_by_expert, experts_tiles, route, tiled_experts
from tests.kernels import contract
from tests.kernels.test_compile import SHARED_MEMORY_BYTES

DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 1e-2) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-5)
SMALL, GROUPED = ExpertsTiles(16, 32, 32, 16, 1, 4, 2), ExpertsTiles(16, 64, 64, 32, 4, 4, 3)
HIDDEN, WIDTH, EXPERTS, TOP_K = 42, 36, 6, 3


class Mixture:
    """Six experts, of whom the last has nothing to do."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(0)
        random = contract.Setting(contract, DEVICE, DTYPE, rounds=True).random  # type: ignore[arg-type]
        self.x, self.weights = random(tokens, HIDDEN), random(tokens, TOP_K)
        self.gate_up, self.down = random(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5, random(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5
        ids = [torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(tokens)]
        self.ids = torch.stack(ids).to(DEVICE, torch.int32)

    def fused(self, config: ExpertsTiles, tokens: slice | list[int] = slice(None)) -> torch.Tensor:
        with contract.poisoned_outputs():
            return tiled_experts(self.x[tokens], self.gate_up, self.down, self.weights[tokens], self.ids[tokens], config)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [(SMALL, 1), (SMALL, 16), (SMALL, 17), (GROUPED, 3), (GROUPED, 33), (ExpertsTiles(64, 32, 128, 64, 2, 4, 3), 65)],
)
def test_every_tile_gives_the_products(config: ExpertsTiles, tokens: int) -> None:
    m = Mixture(tokens)
    expected = plain.experts(m.x.float(), m.gate_up.float(), m.down.float(), m.weights.float(), m.ids)
    torch.testing.assert_close(m.fused(config).float(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("config", [SMALL, GROUPED])
def test_a_token_does_not_depend_on_its_neighbours(config: ExpertsTiles) -> None:
    """To the bit: alone, among few, among many who need sorting, in another order."""
    m = Mixture(24)
    together = m.fused(config)
    for tokens in (slice(7, 8), slice(16, 24), list(range(23, -1, -1))):
        assert torch.equal(m.fused(config, tokens), together[tokens])


@pytest.mark.parametrize("tokens", [4, 14])
def test_padding_does_no_harm(tokens: int) -> None:
    """A recorded step's further tokens are one, many times, of whatever size."""
    m = Mixture(tokens)
    before = m.fused(SMALL)
    m.x, m.weights = (torch.cat((t, 30 * t[:1].expand(7, -1))) for t in (m.x, m.weights))
    m.ids = torch.cat((m.ids, m.ids[:1].expand(7, -1)))
    assert torch.equal(m.fused(SMALL)[:tokens], before)


@pytest.mark.parametrize(
    "ids", [[3] * 40, [0] * 16 + [4] * 17, [4, 0, 2, 0, 1, 1, 3] * 5, [*range(5)] * 17, [*range(5), *[2] * 16], [4] * 5000]
)
def test_every_choice_has_one_row_in_a_block_of_its_expert(ids: list[int]) -> None:
    config = SMALL._replace(group_m=3)
    with contract.poisoned_outputs():
        blocks, rows = _sort_by_expert(torch.tensor(ids, dtype=torch.int32, device=DEVICE).view(-1, 1), 5, config)
    assert len(blocks) % config.group_m == 0
    found: list[tuple[int, int]] = []
    for expert, block in zip(blocks.tolist(), rows.tolist(), strict=True):
        if expert >= 0:
            found += [(expert, choice) for choice in block if choice >= 0]
            assert block[0] >= 0
    assert found == sorted((expert, choice) for choice, expert in enumerate(ids))


def test_the_lowest_id_of_equals_comes_first() -> None:
    logits = torch.zeros(2, 100, device=DEVICE, dtype=torch.bfloat16)
    logits[1, [99, 40, 7]] = 1.0
    assert route(logits, 4, True)[1].tolist() == [[0, 1, 2, 3], [7, 40, 99, 0]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_there_are_experts_whatever_the_logits() -> None:
    logits = torch.randn(4, 20, device=DEVICE)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    logits[2, 4] = float("inf")
    logits[3] = -float("inf")
    for row in route(logits, 8, True)[1].tolist():
        assert len(set(row)) == 8 and min(row) >= 0 and max(row) < 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 512, 513, 100_000])
def test_a_tile_for_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    config = experts_tiles(tokens, dtype)
    widest = max(2 * config.gate_n, config.down_n)
    assert config.num_stages * (config.block_m + widest) * config.block_k * dtype.itemsize <= SHARED_MEMORY_BYTES
    assert min(config.gate_n, config.down_n) >= 32
