from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import HFOracle
from tests.runner.driver import Driver, tiny_config


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads only wait for each other when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_driver(tiny_model_dirs: Callable[[str], Path]) -> Iterator[Callable[..., Driver]]:
    """Drivers on the tiny model of a family; keywords are EngineArgs' or the Driver's."""
    drivers: list[Driver] = []

    def make(family: str = "qwen2_5_vl", **args: Any) -> Driver:
        own = {name: args.pop(name) for name in ("num_blocks", "encoder_rows", "slab_bytes") if name in args}
        drivers.append(Driver(tiny_config(tiny_model_dirs(family), **args), **own))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture(scope="session")
def image_token_id(hf_oracle: HFOracle) -> int:
    return hf_oracle.model.config.image_token_id
