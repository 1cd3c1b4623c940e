"""Which tokens may come next, and how much likelier each is made: biases, tokens and words that are banned, masks.

A ban is a bias that nothing outweighs. It is finite: where a mask leaves only what is banned, that is taken, so what a grammar
demands goes before what a request would rather not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmv1.runner.platform import Platform
from mmv1.types import SamplingParams

if TYPE_CHECKING:
    from mmv1.runner.sampling_columns import SamplingBatch

_BANNED = -1e30  # divided by the smallest temperature it is still a float32


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Those of one request, the same at every position but for `min_tokens`."""

    biased_ids: np.ndarray  # int64 [B], distinct
    biases: np.ndarray  # float32 [B]
    stop_ids: np.ndarray  # int64: banned before `min_tokens` tokens
    min_tokens: int
    words: tuple[tuple[int, ...], ...]  # of two tokens or more: the last is banned behind the others
    allowed: bytes | None  # as a mask


def make_token_rules(params: SamplingParams, eos_token_ids: Sequence[int]) -> TokenRules | None:
    """None: the request has none."""
    words = params.bad_words_token_ids
    if not (params.logit_bias or params.min_tokens or words or params.allowed_token_ids is not None):
        return None
    biases = params.logit_bias | {word[0]: _BANNED for word in words if len(word) == 1}
    return TokenRules(
        biased_ids=np.fromiter(biases.keys(), dtype=np.int64, count=len(biases)),
        biases=np.fromiter(biases.values(), dtype=np.float32, count=len(biases)),
        stop_ids=np.array(sorted({*eos_token_ids, *params.stop_token_ids}), dtype=np.int64),
        min_tokens=params.min_tokens,
        words=tuple(word for word in words if len(word) > 1),
        allowed=None if params.allowed_token_ids is None else _as_mask(params.allowed_token_ids),
    )


def apply_token_rules(
    scores: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor, platform: Platform
) -> torch.Tensor:
    """`scores` [S, V] itself, or a copy with every request's biases and bans. `token_ids`: see Sampler."""
    rules: list[tuple[int, TokenRules]] = [(i, each) for i, each in enumerate(batch.token_rules) if each is not None]
    if not rules:
        return scores
    vocab_size = scores.shape[1]
    num_generated = batch.num_tokens - batch.num_prompt_tokens
    scores = scores.clone()
    flat = scores.view(-1)
    places, biases = [], []
    for place, each in rules:
        places.append(place * vocab_size + each.biased_ids)
        biases.append(each.biases)
        if num_generated[place] < each.min_tokens:
            places.append(place * vocab_size + each.stop_ids)
            biases.append(np.full(len(each.stop_ids), _BANNED, dtype=np.float32))
    if sum(map(len, places)):
        flat.index_add_(0, *platform.upload_together(np.concatenate(places), np.concatenate(biases)))
    words = [(i, word) for i, each in rules for word in each.words if num_generated[i] >= len(word) - 1]
    if words:
        _ban_last_tokens(scores, words, batch, token_ids, platform)
    return scores


def _ban_last_tokens(
    scores: torch.Tensor,
    words: list[tuple[int, tuple[int, ...]]],
    batch: SamplingBatch,
    token_ids: torch.Tensor,
    platform: Platform,
) -> None:
    """Each of `words`, by its request's place, may not be completed: whether the request's last tokens are the word's beginning
    is compared on the device, where the newest of them may be known alone."""
    most = max(len(word) for _, word in words) - 1
    beginnings = np.full((len(words), most), -1, dtype=np.int64)  # [W, most], at the end of each row; -1: any token
    for row, (_, word) in zip(beginnings, words, strict=True):
        row[most - len(word) + 1 :] = word[:-1]
    of_batch = np.array([place for place, _ in words], dtype=np.int64)
    last_ids = np.array([word[-1] for _, word in words], dtype=np.int64)
    flat_beginnings, rows, ends, banned = platform.upload_together(
        beginnings.reshape(-1), batch.rows[of_batch], batch.num_tokens[of_batch], of_batch * scores.shape[1] + last_ids
    )
    behind = torch.arange(-most, 0, device=scores.device)
    index = (ends.unsqueeze(1) + behind).clamp_(min=0)
    expected = flat_beginnings.view(index.shape)
    is_begun = ((token_ids[rows.unsqueeze(1), index] == expected) | (expected < 0)).all(dim=1)
    scores.view(-1).index_add_(0, banned, is_begun.to(scores.dtype) * _BANNED)


def apply_masks(scores: torch.Tensor, batch: SamplingBatch, platform: Platform) -> torch.Tensor:
    """`scores` [S, V] itself, or a copy with -inf where a grammar or `allowed_token_ids` do not allow a token."""
    masks: dict[int, bytes] = {i: each.allowed for i, each in enumerate(batch.token_rules) if each and each.allowed is not None}
    masks |= {i: mask for i, mask in enumerate(batch.masks) if mask is not None}
    if not masks:
        return scores
    num_bytes = -(-scores.shape[1] // 8)
    packed = np.zeros((len(masks), num_bytes), dtype=np.uint8)
    for row, mask in zip(packed, masks.values(), strict=True):
        bits = np.frombuffer(mask, dtype=np.uint8)[:num_bytes]
        row[: len(bits)] = bits
    places = platform.upload(np.fromiter(masks.keys(), dtype=np.int64, count=len(masks)))
    shifts = torch.arange(8, dtype=torch.uint8, device=scores.device)
    is_allowed = (platform.upload(packed).unsqueeze(2) >> shifts).bitwise_and_(1).view(len(masks), -1)[:, : scores.shape[1]]
    masked = scores.index_select(0, places).masked_fill_(is_allowed == 0, -torch.inf)
    return scores.index_copy(0, places, masked)


def _as_mask(token_ids: Sequence[int]) -> bytes:
    bits = np.zeros(max(token_ids) + 1, dtype=np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").tobytes()
