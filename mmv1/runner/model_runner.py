"""The order of a step, nothing else: learn what changed, prepare, forward, logits, sample, hand over the output."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from mmv1.encoder_cache.tensors import EncoderCacheTensors
from mmv1.models.interface import Model
from mmv1.runner.attention.backend import AttentionBackend
from mmv1.runner.encoder_runner import EncoderRunner
from mmv1.runner.input_batch import InputBatch, StepInputs
from mmv1.runner.platform import DeviceClock, Platform
from mmv1.runner.positions import request_positions
from mmv1.runner.sampler import Sampler, SamplerOutput
from mmv1.runner.sampling_columns import SamplingBatch
from mmv1.runner.step_forward import StepForward
from mmv1.runner.tower_forward import TowerForward
from mmv1.step import ModelRunnerOutput, NewRequestData, SchedulerOutput, StageSeconds
from mmv1.types import TokenLogprobs

_NOBODY_ASKED = np.empty(0)


class PendingOutput:
    """A step that has been launched. `wait` gives its result and may be called on another thread, meanwhile the next step may
    be launched."""

    def __init__(
        self,
        step_id: int,
        platform: Platform,
        clock: DeviceClock,
        request_ids: Sequence[str] = (),
        sampled: SamplerOutput | None = None,
        num_logprobs: np.ndarray = _NOBODY_ASKED,
    ) -> None:
        """`num_logprobs` [requests]: how many likeliest tokens each asked for."""
        self._clock = clock
        self._step_id = step_id
        self._request_ids = request_ids
        self._num_logprobs = num_logprobs
        tensors: list[torch.Tensor] = []
        self._asked: list[int] = []  # places of the requests that want log-probabilities
        if sampled is not None:
            tensors.append(sampled.token_ids)
            if sampled.logprobs is not None:
                self._asked = sampled.logprobs.requests.tolist()
                tensors += sampled.logprobs.tensors
        # Without tensors too: until the device is done with a step, it reads embeddings that must not be overwritten.
        self._copy = platform.copy_to_host(tensors)

    def wait(self) -> ModelRunnerOutput:
        values = self._copy.wait()
        token_ids = values[0].tolist() if values else []
        return ModelRunnerOutput(
            step_id=self._step_id,
            request_ids=list(self._request_ids),
            sampled_token_ids=token_ids,
            logprobs=self._read_logprobs(token_ids, *values[1:]) if self._asked else None,
            seconds=StageSeconds(**self._clock.take()),
        )

    def _read_logprobs(
        self, token_ids: list[int], top_ids: np.ndarray, top_logprobs: np.ndarray, sampled: np.ndarray, ranks: np.ndarray
    ) -> dict[str, TokenLogprobs]:
        result = {}
        for i, place in enumerate(self._asked):
            count = int(self._num_logprobs[place])
            result[self._request_ids[place]] = TokenLogprobs(
                [token_ids[place], *top_ids[i, :count].tolist()],
                [float(sampled[i]), *top_logprobs[i, :count].tolist()],
                int(ranks[i]),
            )
        return result


class ModelRunner:
    """Runs steps on one device. `seed` chooses for requests that bring no seed of their own."""

    def __init__(
        self,
        model: Model,
        platform: Platform,
        backend: AttentionBackend,
        tower: TowerForward,
        kv_caches: Sequence[torch.Tensor],
        encoder_cache: EncoderCacheTensors,
        pixel_slab: np.ndarray | None,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        seed: int,
    ) -> None:
        self._model = model
        self._platform = platform
        self.encoder = EncoderRunner(model, platform, tower, encoder_cache, pixel_slab)
        self._batch = InputBatch(
            platform,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            num_position_axes=model.num_position_axes,
        )
        tables = self._batch.token_ids, self._batch.block_table
        self._forward = StepForward(model, platform, backend, kv_caches, *tables, encoder_cache.slab, block_size)
        self._sampler = Sampler(platform, model.vocab_size)
        self._seed = seed
        self._clock = platform.clock()

    @torch.inference_mode()
    def record(self, sizes: Sequence[int]) -> None:
        """Record the steps of these numbers of tokens as graphs."""
        with self._platform.on_step_stream():
            self._forward.record(sizes)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> PendingOutput:
        """Launch a step. Raises EngineError when the step contradicts what the worker knows."""
        with self._platform.on_step_stream():
            return self._execute(step)

    def _execute(self, step: SchedulerOutput) -> PendingOutput:
        self.encoder.follow(step.after_batch)
        self._clock.restart()
        self._update(step)
        if not step.num_scheduled_tokens:
            return PendingOutput(step.step_id, self._platform, self._clock)
        inputs = self._batch.prepare(step.num_scheduled_tokens)
        self.encoder.place_images(inputs, self._batch)
        hidden = self._forward(inputs)
        if not inputs.sampling_ids:
            self._clock.lap({"prefill": 1.0})
            return PendingOutput(step.step_id, self._platform, self._clock)
        sampled, params = self._sample(hidden, inputs, step.token_masks)
        num_decoded = int((inputs.query_lens == 1).sum())  # all but a last token of a prompt that comes alone
        share = num_decoded / step.total_num_scheduled_tokens
        self._clock.lap({"prefill": 1.0 - share, "decode": share})
        return PendingOutput(step.step_id, self._platform, self._clock, inputs.sampling_ids, sampled, params.logprobs)

    def _sample(
        self, hidden: torch.Tensor, inputs: StepInputs, token_masks: dict[str, bytes]
    ) -> tuple[SamplerOutput, SamplingBatch]:
        last_tokens, places = self._platform.upload_together(inputs.sampling_tokens, inputs.sampled_places)
        if len(inputs.sampling_tokens) < inputs.num_tokens:
            hidden = hidden.index_select(0, last_tokens)
        params = self._batch.sampling_batch(inputs, token_masks)
        token_ids = self._batch.token_ids
        sampled = self._sampler(self._model.compute_logits(hidden), params, token_ids.tensor)
        token_ids.flat.index_copy_(0, places, sampled.token_ids.int())
        return sampled, params

    def _update(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            self._batch.remove(request_id)
        for data in step.new_requests:
            positions = request_positions(self._model, data.num_prompt_tokens, data.mm_features)
            self._batch.add(data, positions, self._seed_of(data))
        self._batch.update(step.cached_requests)

    def _seed_of(self, data: NewRequestData) -> int:
        """64 bits: the request's own seed; without one, a hash of the engine's seed and the request's id."""
        if data.sampling_params.seed is not None:
            return data.sampling_params.seed % (1 << 64)
        key = (self._seed % (1 << 64)).to_bytes(8, "little")
        digest = hashlib.blake2b(data.request_id.encode(), key=key, digest_size=8).digest()
        return int.from_bytes(digest, "little")
