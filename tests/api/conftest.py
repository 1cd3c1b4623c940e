from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.fake_llm import FakeLLM, make_model_dir


@pytest.fixture
def llm(tmp_path: Path) -> FakeLLM:
    return FakeLLM(make_model_dir(tmp_path))
