"""The clip rule: how far a chunk may run, given which pictures can be had in this step.

A chunk may run up to, and not into, the first picture whose embedding is neither cached nor encodable in this step. If it
would start inside such a picture, the request gets no tokens this step. A chunk boundary may fall inside a picture that can
be had: pictures are encoded whole, tokens are not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from mmv1.types import MMFeature


class Picture(Enum):
    """What the ledgers say of one picture at this moment."""

    HELD = 1  # embedding cached, and referenced by somebody: using it takes no room from anyone
    CACHED = 2  # embedding cached, evictable until it is referenced
    READY = 3  # pixels lie in the slab: encodable if budget and room allow
    MISSING = 4  # pixels have to be asked for, or are on their way


@dataclass
class Clip:
    """The verdict on one chunk. Indices are into the request's mm_features."""

    num_new_tokens: int
    to_reference: list[int] = field(default_factory=list)  # every picture the chunk touches
    to_encode: list[int] = field(default_factory=list)  # of these, the ones to encode in this step
    blocked_by: int | None = None  # the picture the chunk was clipped at


def clip_chunk(
    features: Sequence[MMFeature],
    num_computed_tokens: int,
    num_new_tokens: int,
    *,
    state_of: Callable[[bytes], Picture],
    size_of: Callable[[int], int],
    available_bytes: int,
    encoder_budget: int,
) -> Clip:
    """Clip the chunk [num_computed_tokens, num_computed_tokens + num_new_tokens) of a request.

    `size_of(num_tokens)` is an embedding's size in bytes, `available_bytes` the free or evictable room of the encoder cache,
    `encoder_budget` the picture tokens this step may still encode. Pure: nothing is taken, so a chunk that finds no KV
    blocks afterwards needs no undoing.
    """
    clip = Clip(num_new_tokens)
    end = num_computed_tokens + num_new_tokens
    first = bisect_right(features, num_computed_tokens, key=_end_of)
    counted: set[bytes] = set()
    for index in range(first, len(features)):
        feature = features[index]
        if feature.offset >= end:
            break
        if feature.mm_hash in counted:
            clip.to_reference.append(index)
            continue
        state = state_of(feature.mm_hash)
        size = 0 if state is Picture.HELD else size_of(feature.num_tokens)
        encode = state is Picture.READY
        if state is Picture.MISSING or size > available_bytes or (encode and feature.num_tokens > encoder_budget):
            clip.num_new_tokens = max(0, feature.offset - num_computed_tokens)
            clip.blocked_by = index
            break
        available_bytes -= size
        if encode:
            encoder_budget -= feature.num_tokens
            clip.to_encode.append(index)
        counted.add(feature.mm_hash)
        clip.to_reference.append(index)
    return clip


def _end_of(feature: MMFeature) -> int:
    return feature.offset + feature.num_tokens
