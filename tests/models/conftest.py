from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
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
def tiny_models(tiny_model_dirs: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """The tiny model of a family, loaded."""

    def load(family: str) -> LanguageModel:
        model = load_model(tiny_config(tiny_model_dirs(family)).model, torch.device("cpu"))
        assert isinstance(model, LanguageModel)
        return model

    return lru_cache(maxsize=None)(load)


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_models("qwen2_5_vl")
