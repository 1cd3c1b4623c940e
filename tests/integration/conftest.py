"""Fixtures of the tests that run real processes on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmv1.engine.llm import LLM
from tests.integration.engines import Engines


@pytest.fixture(scope="module")
def engines(tiny_model_dir: Path):
    """`engines.get(**settings)`: an LLM with these settings, started once in a module."""
    with Engines(tiny_model_dir) as started:
        yield started


@pytest.fixture(scope="module")
def llm(engines: Engines) -> LLM:
    """One with the default settings."""
    return engines.get()
