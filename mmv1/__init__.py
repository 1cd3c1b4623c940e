"""mmv1: a multimodal-first LLM serving engine. `LLM` for scripts, `mmv1 serve` for everyone else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmv1.types import SamplingParams

if TYPE_CHECKING:
    from mmv1.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # on demand: the command line and the pool's processes import this package too
        from mmv1.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'mmv1' has no attribute '{name}'")
