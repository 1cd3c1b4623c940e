"""Positions of a request's tokens, on the axes of its model's rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmv1.models.interface import ImageSpan, Model
from mmv1.types import MMFeature


class RequestPositions(NamedTuple):
    """The prompt's tokens are placed by the family; every later token at its index plus `delta`, on all axes."""

    prompt: np.ndarray  # int32 [axes, prompt tokens]
    delta: int


def request_positions(model: Model, num_prompt_tokens: int, features: Sequence[MMFeature]) -> RequestPositions:
    prompt = model.prompt_positions(num_prompt_tokens, [ImageSpan(f.offset, f.grid_thw) for f in features])
    return RequestPositions(prompt, int(prompt.max()) + 1 - num_prompt_tokens)
