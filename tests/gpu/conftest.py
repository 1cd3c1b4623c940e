"""Tests that need a CUDA device; without one every test below this folder is skipped.

MMV1_GPU_MODELS: a folder where random models of real shapes are made, and kept (30 GB). Else they are made for the session.
MMV1_GPU_RESULTS: a JSON file for what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from mmv1.engine.llm import LLM
from tests.gpu.random_models import SHAPES, find_or_make
from tests.gpu.reference import Reference, ask_reference
from tests.integration.conversations import Case, make_cases

HERE = Path(__file__).parent
# Several engines share the device: none takes what it can get.
SMALL = {"gpu_memory_utilization": 0.95, "kv_cache_memory_bytes": 1 << 29, "encoder_cache_bytes": 1 << 26}
MEMORY = {"gpu_memory_utilization": 0.95, "kv_cache_memory_bytes": 8 << 30, "encoder_cache_bytes": 1 << 30}  # of a real shape
NUM_CASES = 200
MAX_TOKENS = 8

Record = Callable[[str, dict[str, Any]], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    """The tiny model in float32 with default settings."""
    with LLM(tiny_model_dir, dtype="float32", **SMALL) as started:
        assert started.engine.ready is not None
        assert started.engine.ready.device != "cpu"
        yield started


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Figures to keep, by name; written as they come."""
    path = os.environ.get("MMV1_GPU_RESULTS")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    about = {"device": device, "python": platform.python_version()}
    results: dict[str, Any] = {"about": about | {name: version(name) for name in ("torch", "transformers")}}

    def keep(name: str, figures: dict[str, Any]) -> None:
        results.setdefault(name, {}).update(figures)
        print(f"{name}: {json.dumps(figures)}")
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(results, indent=1) + "\n")

    yield keep


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Two hundred: pictures of twenty sizes, up to four in one, a fifth of them without any."""
    return make_cases(NUM_CASES, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def references(conversations: list[Case]) -> Iterator[Callable[[str], Reference]]:
    """The model directory of a shape and what transformers makes of it, once for all tests."""
    asked: dict[str, Reference] = {}
    with tempfile.TemporaryDirectory() as for_the_session:
        folder = Path(os.environ.get("MMV1_GPU_MODELS") or for_the_session)

        def reference(shape: str) -> Reference:
            if shape not in asked:
                asked[shape] = ask_reference(find_or_make(SHAPES[shape], folder), conversations, MAX_TOKENS)
            return asked[shape]

        yield reference
