"""Request: the only mutable record of a request inside the engine. Torch-free.

Invariant, between steps: num_computed_tokens <= num_tokens_expected, and num_tokens <= num_tokens_expected <= max_total_tokens.
A request has nothing left to schedule when it has no uncomputed expected token, or when every token it may have is expected.
"""

from __future__ import annotations

import enum
from typing import Protocol

from mmv1.types import EngineCoreRequest, FinishReason


class RequestStatus(enum.IntEnum):
    WAITING = 0  # in the waiting queue, for the first time or after a preemption; holds no KV
    RUNNING = 1
    FINISHED = 2


class TokenMatcher(Protocol):
    """Where an answer is in the grammar that it must follow."""

    error: str  # why it cannot go on; "" if it can

    def mask(self) -> bytes:
        """Which tokens may follow; see SchedulerOutput.token_masks. Never none."""

    def advance(self, token_id: int) -> bool:
        """This token has followed. False: it could not, or nothing can follow it."""


class Request:
    """See the module's invariant. Counts are in tokens."""

    __slots__ = (
        "arrival_key",
        "block_hashes",
        "cache_salt",
        "eos_token_ids",
        "grammar",
        "kv_capacity",
        "max_total_tokens",
        "mm_end",
        "mm_features",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "num_tokens_expected",
        "request_id",
        "sampling_params",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, core_request: EngineCoreRequest, arrival_key: tuple[int, ...], grammar: TokenMatcher | None = None
    ) -> None:
        params = core_request.sampling_params
        self.request_id = core_request.request_id
        self.arrival_key = arrival_key  # smaller goes first; unique
        self.token_ids = list(core_request.prompt_token_ids)  # prompt, then the confirmed output
        self.num_prompt_tokens = len(core_request.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens  # len(token_ids)
        self.num_tokens_expected = self.num_prompt_tokens  # and one for each token that steps in flight will sample
        self.num_computed_tokens = 0  # whose KV is computed, or will be when the steps in flight are done
        self.max_total_tokens = self.num_prompt_tokens + core_request.max_tokens
        self.mm_features = core_request.mm_features
        self.mm_end = self.mm_features[-1].offset + self.mm_features[-1].num_tokens if self.mm_features else 0
        self.sampling_params = params
        self.grammar = grammar  # has followed the confirmed output
        self.eos_token_ids = core_request.eos_token_ids
        self.stop_token_ids = frozenset(params.stop_token_ids) | frozenset(core_request.eos_token_ids)
        self.cache_salt = core_request.cache_salt
        self.block_hashes: list[bytes] = []  # of the full blocks of token_ids, as far as they were needed
        self.kv_capacity = 0  # tokens its KV blocks have room for; kept by the KV ledger
        self.num_cached_tokens = -1  # prompt tokens found in the prefix cache when it was first scheduled; -1 before
        self.status = RequestStatus.WAITING

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Confirm one sampled token; the reason to end with it, if there is one."""
        self.token_ids.append(token_id)
        self.num_tokens += 1
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if self.num_tokens >= self.max_total_tokens:
            return FinishReason.LENGTH
        return None

    def stop_reason(self, token_id: int) -> int | None:
        """What OpenAI-style clients see as stop_reason: the stop_token_id that ended it, None for end-of-sequence."""
        return None if token_id in self.eos_token_ids else token_id

    def reset_for_preemption(self) -> None:
        """Forget all computed KV; the tokens stay. What steps in flight still sample will be appended as usual."""
        self.num_computed_tokens = 0
        self.status = RequestStatus.WAITING
