"""Fixtures every room shares: the tiny models, made once, and the references that read the same directories."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
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


def made_once(kind: str, source: Path, packages: tuple[str, ...], make: Callable[[Path], object]) -> Path:
    """A directory that `make` fills. Kept under build/ and made again only when the code or the packages that make it change."""
    from importlib.metadata import version

    parts = [source.read_bytes(), *(version(name).encode() for name in packages)]
    path = ROOT / "build" / f"{kind}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{kind}-"))
        make(unfinished)
        try:
            unfinished.rename(path)  # all at once: a second run never sees half a model
        except OSError:  # another run was quicker
            shutil.rmtree(unfinished)
    return path


@pytest.fixture(scope="session")
def tiny_model_dirs() -> Callable[[str], Path]:
    """The tiny random model of a family (see examples/tiny_model.py)."""

    def find_or_make(family: str) -> Path:
        def make(folder: Path) -> None:
            from examples.tiny_model import make_tiny_model

            make_tiny_model(folder, family=family)

        return made_once(f"tiny-{family}", ROOT / "examples" / "tiny_model.py", ("transformers", "torch"), make)

    return find_or_make


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_model_dirs: Callable[[str], Path]) -> Path:
    """A tiny random Qwen2.5-VL."""
    return tiny_model_dirs("qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_clip() -> str:
    """NAME:WEIGHTS of a tiny random CLIP model. Once it is made, no test imports open_clip for it."""
    from tests.tiny_clip import make_clip, spelled

    return spelled(made_once("tiny-clip", ROOT / "tests" / "tiny_clip.py", ("open_clip_torch", "torch"), make_clip))


@pytest.fixture(scope="session")
def hf_oracles(tiny_model_dirs: Callable[[str], Path]) -> Callable[[str], HFOracle]:
    """By family: answers conversations as transformers does, `hf_oracles("llama")(conversation, max_new_tokens=8)`."""
    from tests.oracle import HFOracle

    return lru_cache(maxsize=None)(lambda family: HFOracle(tiny_model_dirs(family)))


@pytest.fixture(scope="session")
def hf_oracle(hf_oracles: Callable[[str], HFOracle]) -> HFOracle:
    """That of the tiny Qwen2.5-VL."""
    return hf_oracles("qwen2_5_vl")


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """What a test makes of the product's logger (a command run in this process configures it) ends with the test."""
    yield
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
