"""A worker without a model, for tests of everything above the runner.

Its "KV" of a token is a fingerprint of the request's whole content up to that token, pictures included, kept per slot exactly
as the block ids of the step say. Before it samples, it checks that every slot of the request holds the request's own
fingerprints: a block handed out twice, a wrong prefix hit, a missing picture or a lost difference is found at once. The sampled
token is a function of the last fingerprint, so a request has one right output, whatever the schedule.

Pictures are encoded beside the steps, as on a device: a batch takes its room when it is launched and its embeddings are usable
when it has been waited for, whatever steps run in between, or in a step that follows it. A step that reads an embedding before
that, or after it was overwritten, is found.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mmv1.step import ENCODER_CACHE_PAGE_ROWS, EncodeBatch, EncodeOutput, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mmv1.types import EngineCoreRequest, MMFeature, SamplingParams

VOCAB = 50
EOS = 7


def content(token_ids: list[int], features: list[MMFeature]) -> list[object]:
    """What each position holds: a token id, or a row of a picture."""
    positions: list[object] = list(token_ids)
    for feature in features:
        for row in range(feature.num_tokens):
            positions[feature.offset + row] = (feature.mm_hash, row)
    return positions


def fingerprints(token_ids: list[int], features: list[MMFeature]) -> list[int]:
    chain, value = [], 0
    for item in content(token_ids, features):
        value = hash((value, item))
        chain.append(value)
    return chain


def sample(fingerprint: int, mask: bytes | None = None) -> int:
    """`mask`: see SchedulerOutput.token_masks."""
    allowed = [token for token in range(VOCAB) if mask is None or mask[token // 8] >> token % 8 & 1]
    return allowed[fingerprint % len(allowed)]


def expected_output(request: EngineCoreRequest, mask_after: Callable[[list[int]], bytes] | None = None) -> list[int]:
    """The one right output. `mask_after`: which tokens may follow an output."""
    tokens = list(request.prompt_token_ids)
    value = fingerprints(tokens, request.mm_features)[-1]
    output: list[int] = []
    while len(output) < request.max_tokens:
        output.append(sample(value, None if mask_after is None else mask_after(output)))
        if output[-1] in request.eos_token_ids or output[-1] in request.sampling_params.stop_token_ids:
            break
        value = hash((value, output[-1]))
    return output


def make_request(
    request_id: str,
    prompt: list[int],
    features: list[MMFeature] | None = None,
    *,
    max_tokens: int = 5,
    eos: tuple[int, ...] = (EOS,),
    priority: int = 0,
    cache_salt: bytes = b"",
) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        mm_features=features or [],
        sampling_params=SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        eos_token_ids=eos,
        priority=priority,
        cache_salt=cache_salt,
    )


def make_prompt(rng: random.Random, pictures: list[tuple[bytes, int]], max_text: int = 12) -> tuple[list[int], list[MMFeature]]:
    """A prompt of random text around the given (mm_hash, num_tokens) pictures."""
    tokens: list[int] = []
    features: list[MMFeature] = []
    for mm_hash, num_tokens in pictures:
        tokens += [rng.randrange(VOCAB) for _ in range(rng.randrange(max_text))]
        features.append(MMFeature(mm_hash, len(tokens), num_tokens, (1, 2, 2 * num_tokens)))
        tokens += [VOCAB] * num_tokens
    tokens += [rng.randrange(VOCAB) for _ in range(1 + rng.randrange(max_text))]
    return tokens, features


class Executed:
    def __init__(self, output: ModelRunnerOutput) -> None:
        self.output = output

    def wait(self) -> ModelRunnerOutput:
        return self.output


class Encoding:
    """A launched batch."""

    def __init__(self, worker: SimulatedWorker, batch: EncodeBatch) -> None:
        self.worker = worker
        self.batch = batch

    def wait(self) -> EncodeOutput:
        self.worker.complete.update(item.mm_hash for item in self.batch.inputs)
        return EncodeOutput(self.batch.batch_id, 0.25)


@dataclass
class _Row:
    token_ids: list[int]
    features: list[MMFeature]
    block_ids: list[int]
    num_computed: int
    chain: list[int]


class SimulatedWorker:
    def __init__(self, num_blocks: int, block_size: int, encoder_pages: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.encoder_pages = encoder_pages
        self.rows: dict[str, _Row] = {}
        self.slots: dict[int, int] = {}
        self.embeddings: dict[bytes, int] = {}  # mm_hash -> pages
        self.complete: set[bytes] = set()  # of these
        self.batch_of: dict[bytes, int] = {}  # of these, the batch that encoded it
        self.num_encoded: dict[bytes, int] = {}
        self.steps: list[SchedulerOutput] = []
        self.batches: list[EncodeBatch] = []
        self.num_tokens_computed = 0

    @property
    def last_batch_id(self) -> int:
        return self.batches[-1].batch_id if self.batches else 0

    def encode(self, batch: EncodeBatch) -> Encoding:
        self.batches.append(batch)
        for mm_hash in batch.free_mm_hashes:
            del self.embeddings[mm_hash], self.batch_of[mm_hash]
            self.complete.remove(mm_hash)
        for item in batch.inputs:
            assert item.mm_hash not in self.embeddings, "encoded although it is cached"
            assert item.offset >= 0 and item.nbytes > 0
            self.embeddings[item.mm_hash] = -(-item.num_tokens // ENCODER_CACHE_PAGE_ROWS)
            self.num_encoded[item.mm_hash] = self.num_encoded.get(item.mm_hash, 0) + 1
            self.batch_of[item.mm_hash] = batch.batch_id
        assert sum(self.embeddings.values()) <= self.encoder_pages, "the encoder cache's store would overflow"
        return Encoding(self, batch)

    def execute(self, step: SchedulerOutput) -> Executed:
        self.steps.append(step)
        assert step.after_batch <= self.last_batch_id, "follows a batch that has not been launched"
        self.complete.update(mm_hash for mm_hash, batch_id in self.batch_of.items() if batch_id <= step.after_batch)
        assert step.total_num_scheduled_tokens == sum(step.num_scheduled_tokens.values()) > 0
        self.num_tokens_computed += step.total_num_scheduled_tokens
        for request_id in step.finished_request_ids:
            del self.rows[request_id]
        for new in step.new_requests:
            self._add(new)
        for request_id, block_ids in zip(step.cached_requests.request_ids, step.cached_requests.new_block_ids, strict=True):
            self.rows[request_id].block_ids += block_ids
        # As on the device: all KV of the step is written before any is read.
        for request_id, count in step.num_scheduled_tokens.items():
            self._write(self.rows[request_id], count)
        read = {i: self._read(self.rows[i], n, step.token_masks.get(i)) for i, n in step.num_scheduled_tokens.items()}
        sampled = {request_id: token for request_id, token in read.items() if token is not None}
        assert step.token_masks.keys() <= sampled.keys(), "masks of requests that sample nothing"
        return Executed(
            ModelRunnerOutput(step_id=step.step_id, request_ids=list(sampled), sampled_token_ids=list(sampled.values()))
        )

    def _add(self, new: NewRequestData) -> None:
        assert new.request_id not in self.rows
        assert len(new.token_ids) > new.num_computed_tokens
        chain = fingerprints(new.token_ids, new.mm_features)
        self.rows[new.request_id] = _Row(
            list(new.token_ids), new.mm_features, list(new.block_ids), new.num_computed_tokens, chain
        )

    def _slot(self, row: _Row, position: int) -> int:
        block_id = row.block_ids[position // self.block_size]
        assert 0 < block_id < self.num_blocks
        return block_id * self.block_size + position % self.block_size

    def _write(self, row: _Row, count: int) -> None:
        stop = row.num_computed + count
        assert stop <= len(row.token_ids), "scheduled past the tokens there are"
        for feature in row.features:
            if feature.offset < stop and feature.offset + feature.num_tokens > row.num_computed:
                assert feature.mm_hash in self.complete, "a chunk runs into a picture that is not encoded"
        for position in range(row.num_computed, stop):
            self.slots[self._slot(row, position)] = row.chain[position]

    def _read(self, row: _Row, count: int, mask: bytes | None) -> int | None:
        row.num_computed += count
        for position in range(row.num_computed):
            assert self.slots.get(self._slot(row, position)) == row.chain[position], "someone else's KV, or none"
        if row.num_computed < len(row.token_ids):
            return None
        token = sample(row.chain[-1], mask)
        row.token_ids.append(token)
        row.chain.append(hash((row.chain[-1], token)))
        return token
