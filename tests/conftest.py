"""Fixtures every room shares: the tiny model, made once, and the reference that reads the same directory."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mmv1.log import logger

if TYPE_CHECKING:
    from tests.oracle import HFOracle

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for a model
os.environ.pop("REDIS_URL", None)  # the tests start their own
# Before torch is imported: its threads would spin while they wait, and slow down whatever else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Before triton is imported: without a CUDA device its kernels run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """A tiny random Qwen2.5-VL. Kept under build/ and made again only when the code that makes it changes."""
    from importlib.metadata import version

    source = (ROOT / "examples" / "tiny_model.py").read_bytes()
    key = hashlib.sha256(source + version("transformers").encode() + version("torch").encode()).hexdigest()[:16]
    path = ROOT / "build" / f"tiny-model-{key}"
    if not path.exists():
        from examples.tiny_model import make_tiny_model

        path.parent.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix="tiny-model-"))
        make_tiny_model(unfinished)
        try:
            unfinished.rename(path)  # all at once: a second run never sees half a model
        except OSError:  # another run was quicker
            shutil.rmtree(unfinished)
    return path


@pytest.fixture(scope="session")
def hf_oracle(tiny_model_dir: Path) -> HFOracle:
    """Answers conversations as transformers does: `hf_oracle(conversation, max_new_tokens=8)`."""
    from tests.oracle import HFOracle

    return HFOracle(tiny_model_dir)


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """What a test makes of the product's logger (a command run in this process configures it) ends with the test."""
    yield
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
