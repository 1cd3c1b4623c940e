"""Step-side messages: what the scheduler tells the workers, and what they answer. Torch-free.

`SchedulerOutput.num_scheduled_tokens` is the step; everything else serves it. Workers keep each request's state themselves,
so a request is described once in full and afterwards only by differences. A preempted request is "finished" for the workers
and comes back later as a new one.

Pictures are encoded by batches of their own, beside the steps. A step reads only embeddings whose batch was done before the
step was submitted, or one that it says it follows; and a batch overwrites only what no step in flight reads. So batches wait for
nothing, and other steps need no order with them.
"""

from __future__ import annotations

import msgspec

from mmv1.types import MMFeature, SamplingParams, TokenLogprobs

# The encoder cache is laid out in pages of this many embedding rows: the ledger and the store round alike.
ENCODER_CACHE_PAGE_ROWS = 16


class NewRequestData(msgspec.Struct, array_like=True):
    """A request the workers do not know (or have forgotten after a preemption), in full.

    `token_ids` are the prompt's, followed by what was generated before a preemption; `num_prompt_tokens` tells them apart.
    The first `num_computed_tokens` of them have their KV in `block_ids` already (a prefix hit).
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    mm_features: list[MMFeature]
    sampling_params: SamplingParams
    block_ids: list[int]
    num_computed_tokens: int
    eos_token_ids: tuple[int, ...] = ()


class CachedRequestData(msgspec.Struct, array_like=True):
    """What changed for requests the workers know, as columns. A request without new blocks is not listed: its tokens follow
    from `num_scheduled_tokens`, and the token sampled last is on the device already."""

    request_ids: list[str]
    new_block_ids: list[list[int]]


class EncoderInput(msgspec.Struct, frozen=True, array_like=True):
    """Encode this picture: patches at [offset, offset + nbytes) of the pixel slab."""

    mm_hash: bytes
    offset: int
    nbytes: int
    grid_thw: tuple[int, int, int]
    num_tokens: int


class EncodeBatch(msgspec.Struct):
    """Pictures to encode together. Order of work for a worker: forget `free_mm_hashes`, then encode."""

    batch_id: int
    inputs: list[EncoderInput]
    free_mm_hashes: list[bytes]


class EncodeOutput(msgspec.Struct, frozen=True):
    """The batch's embeddings are in the encoder cache."""

    batch_id: int
    seconds: float = 0.0  # the device worked at it


class SchedulerOutput(msgspec.Struct, kw_only=True):
    """One step. Order of work for a worker: forget `finished_request_ids`, learn the new requests (which may be among those
    just forgotten) and blocks, then run `num_scheduled_tokens` tokens of each request and sample where its known tokens are
    used up."""

    step_id: int
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    new_requests: list[NewRequestData]
    cached_requests: CachedRequestData
    finished_request_ids: list[str]
    after_batch: int = 0  # reads embeddings of encode batches up to this one, which was submitted before: it begins behind them
    token_masks: dict[str, bytes] = {}  # of requests that sample by a grammar: bit i % 8 of byte i // 8, may token i follow?


class StageSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """What the device worked at. Steps mix prefill and decode: each has the share of a step's time that it has of its tokens."""

    prefill: float = 0.0
    decode: float = 0.0


class ModelRunnerOutput(msgspec.Struct, kw_only=True):
    """The result of one step: for each request that sampled a token in it, in any order, that token.

    A request that is still in its prompt after the step samples nothing and is not listed."""

    step_id: int
    request_ids: list[str]
    sampled_token_ids: list[int]
    logprobs: dict[str, TokenLogprobs] | None = None  # only for requests that asked for them
    seconds: StageSeconds = StageSeconds()  # of work that ended on the device since the step before, this one's or another's


class KVCacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One group of layers that share block tables. Today every group is paged full attention; sliding windows and the
    fixed-size state of hybrid models are further kinds of group, managed by the same ledger."""

    kind: str = "full_attention"
    layer_names: tuple[str, ...]
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int

    def bytes_per_token(self) -> int:
        return 2 * len(self.layer_names) * self.num_kv_heads * self.head_dim * self.dtype_bytes
