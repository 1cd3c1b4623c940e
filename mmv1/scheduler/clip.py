"""The clip rule: how far a chunk may run, given which pictures' embeddings are in the encoder cache and can be read.

A chunk may run up to, and not into, the first picture whose embedding is not there. If it would start inside such a picture,
the request gets no tokens this step. A chunk boundary may fall inside a picture that is there: pictures are encoded whole,
tokens are not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mmv1.types import MMFeature


class Clip(NamedTuple):
    """The verdict on one chunk. Indices are into the request's mm_features."""

    num_new_tokens: int
    touched: range  # every picture the chunk touches
    blocked_by: int | None = None  # the picture the chunk was clipped at


def clip_chunk(
    features: Sequence[MMFeature], num_computed_tokens: int, num_new_tokens: int, is_there: Callable[[bytes], bool]
) -> Clip:
    """Clip the chunk [num_computed_tokens, num_computed_tokens + num_new_tokens) of a request. Pure: nothing is taken, so a
    chunk that finds no KV blocks afterwards needs no undoing."""
    end = num_computed_tokens + num_new_tokens
    first = index = bisect_right(features, num_computed_tokens, key=_end_of)
    while index < len(features) and features[index].offset < end:
        feature = features[index]
        if not is_there(feature.mm_hash):
            return Clip(max(0, feature.offset - num_computed_tokens), range(first, index), index)
        index += 1
    return Clip(num_new_tokens, range(first, index))


def _end_of(feature: MMFeature) -> int:
    return feature.offset + feature.num_tokens
