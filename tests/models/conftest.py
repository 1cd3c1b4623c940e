from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmv1.models.language_model import LanguageModel
from mmv1.models.registry import load_model
from tests.runner.driver import tiny_config


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads only wait for each other when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> LanguageModel:
    model = load_model(tiny_config(tiny_model_dir).model, torch.device("cpu"))
    assert isinstance(model, LanguageModel)
    return model
