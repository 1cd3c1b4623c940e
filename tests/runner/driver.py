"""A toy scheduler for the runner's tests: it makes SchedulerOutputs by hand, exactly as told, and collects what comes back.

Also pictures as the pixel slab holds them, prompts around them, and the same inputs in the form transformers takes.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmv1.config import EngineArgs, EngineConfig, resolve
from mmv1.runner.model_runner import PendingOutput
from mmv1.runner.worker import Worker
from mmv1.step import CachedRequestData, EncodeBatch, EncoderInput, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mmv1.types import MMFeature, SamplingParams, TokenLogprobs

GREEDY = SamplingParams(temperature=0.0)
MERGE = 2


@dataclass(frozen=True)
class Picture:
    """A random picture of whole merge units."""

    pixels: np.ndarray  # uint8 [height, width, 3]
    patch: int = 14  # pixels along its side

    @property
    def mm_hash(self) -> bytes:
        return hashlib.sha256(self.pixels.tobytes() + str(self.pixels.shape).encode()).digest()

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        return 1, self.pixels.shape[0] // self.patch, self.pixels.shape[1] // self.patch

    @property
    def num_tokens(self) -> int:
        return self.grid_thw[1] * self.grid_thw[2] // MERGE**2

    @property
    def patches(self) -> np.ndarray:
        """uint8 [patches, 3 * patch**2] in merge-unit order."""
        _, h, w = self.grid_thw
        cut = self.pixels.reshape(h // MERGE, MERGE, self.patch, w // MERGE, MERGE, self.patch, 3)
        return np.ascontiguousarray(cut.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(h * w, -1)


def make_picture(rows: int, columns: int, seed: int = 0, patch: int = 14) -> Picture:
    """`rows` x `columns` merge units."""
    rng = np.random.default_rng([rows, columns, seed])
    return Picture(rng.integers(0, 256, (rows * MERGE * patch, columns * MERGE * patch, 3), dtype=np.uint8), patch)


def patch_of(family: str) -> int:
    """Pixels along a patch's side, in the tiny model of a family that sees."""
    return 16 if family.startswith("qwen3") else 14


@dataclass
class Prompt:
    token_ids: list[int]
    features: list[MMFeature]
    pictures: list[Picture]


def make_prompt(parts: list[int | Picture], *, image_token_id: int, seed: int = 0, vocab_size: int = 250) -> Prompt:
    """Parts in order: a number of random text tokens, or a picture's placeholders."""
    rng = np.random.default_rng(seed)
    prompt = Prompt([], [], [])
    for part in parts:
        if isinstance(part, Picture):
            prompt.features.append(MMFeature(part.mm_hash, len(prompt.token_ids), part.num_tokens, part.grid_thw))
            prompt.pictures.append(part)
            prompt.token_ids += [image_token_id] * part.num_tokens
        else:
            prompt.token_ids += rng.integers(0, vocab_size, part).tolist()
    return prompt


def hf_inputs(prompt: Prompt, processor: Any, image_token_id: int) -> dict[str, torch.Tensor]:
    """The prompt as transformers' model takes it."""
    ids = torch.tensor([prompt.token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pictures:
        inputs["mm_token_type_ids"] = (ids == image_token_id).int()
        images = [torch.from_numpy(p.pixels).permute(2, 0, 1) for p in prompt.pictures]
        inputs |= processor.image_processor(images, do_resize=False, return_tensors="pt")
    return inputs


def tiny_config(model_dir: Path, **args: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "block_size": 16, "max_model_len": 1024}
    return resolve(EngineArgs(model=str(model_dir), **(defaults | args)))


@dataclass
class _Request:
    prompt: Prompt
    params: SamplingParams
    token_ids: list[int]  # prompt and confirmed output
    num_expected: int  # and tokens in flight
    computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    known: bool = False  # to the worker
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Driver:
    """Owns a worker, hands out its blocks, and keeps every picture's embedding once encoded unless told to drop it."""

    def __init__(
        self, config: EngineConfig, *, num_blocks: int = 256, encoder_rows: int = 2048, slab_bytes: int = 8 << 20
    ) -> None:
        self._block_size = config.cache.block_size
        self._slab_fd = os.memfd_create("slab")
        os.ftruncate(self._slab_fd, slab_bytes)
        self._slab_end = 0
        self.worker = Worker(config, self._slab_fd)
        self.worker.init_device()
        self.worker.load_model()
        self.worker.initialize_caches(num_blocks, encoder_rows * self.worker.get_embedding_bytes_per_token())
        self._free_blocks = deque(range(1, num_blocks))
        self.requests: dict[str, _Request] = {}
        self._placed: dict[bytes, EncoderInput] = {}
        self.encoded: set[bytes] = set()
        self._finished: list[str] = []
        self._dropped: list[bytes] = []
        self._step_id = 0
        self._in_flight: deque[PendingOutput] = deque()

    def close(self) -> None:
        os.close(self._slab_fd)

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams = GREEDY) -> None:
        for picture in prompt.pictures:
            self._place(picture)
        self.requests[request_id] = _Request(prompt, params, list(prompt.token_ids), len(prompt.token_ids))

    def _place(self, picture: Picture) -> None:
        """Put the patches into the slab, where a preprocess worker would."""
        if picture.mm_hash not in self._placed:
            data = picture.patches.tobytes()
            os.pwrite(self._slab_fd, data, self._slab_end)
            self._placed[picture.mm_hash] = EncoderInput(
                picture.mm_hash, self._slab_end, len(data), picture.grid_thw, picture.num_tokens
            )
            self._slab_end += len(data)

    def finish(self, request_id: str) -> _Request:
        request = self.requests.pop(request_id)
        self._forget(request_id, request)
        return request

    def preempt(self, request_id: str) -> None:
        """Take its KV away: it comes back in full with the next step that schedules it."""
        request = self.requests[request_id]
        self._forget(request_id, request)
        request.known, request.computed, request.block_ids = False, 0, []

    def _forget(self, request_id: str, request: _Request) -> None:
        if request.known:
            self._finished.append(request_id)
        self._free_blocks.extend(request.block_ids)

    def drop_embedding(self, mm_hash: bytes) -> None:
        self.encoded.discard(mm_hash)
        self._dropped.append(mm_hash)

    def launch(self, num_scheduled_tokens: dict[str, int], ahead: tuple[Picture, ...] = ()) -> None:
        """Launch one step; `ahead`: pictures to encode although no chunk needs them yet."""
        self._step_id += 1
        new, cached = [], CachedRequestData([], [])
        encoder_inputs = [self._encode(p.mm_hash) for p in ahead if p.mm_hash not in self.encoded]
        for request_id, count in num_scheduled_tokens.items():
            request = self.requests[request_id]
            stop = request.computed + count
            for feature in request.prompt.features:
                touched = request.computed < feature.offset + feature.num_tokens and feature.offset < stop
                if touched and feature.mm_hash not in self.encoded:
                    encoder_inputs.append(self._encode(feature.mm_hash))
            wanted = -(-stop // self._block_size) - len(request.block_ids)
            blocks = [self._free_blocks.popleft() for _ in range(wanted)]
            request.block_ids += blocks
            if not request.known:
                new.append(self._describe(request_id, request))
            elif blocks:
                cached.request_ids.append(request_id)
                cached.new_block_ids.append(blocks)
            request.known, request.computed = True, stop
            if stop == request.num_expected:
                request.num_expected += 1
        step = SchedulerOutput(
            step_id=self._step_id,
            num_scheduled_tokens=num_scheduled_tokens,
            total_num_scheduled_tokens=sum(num_scheduled_tokens.values()),
            new_requests=new,
            cached_requests=cached,
            finished_request_ids=self._finished,
        )
        self._finished = []
        if encoder_inputs or self._dropped:
            self.worker.encode(EncodeBatch(self._step_id, encoder_inputs, self._dropped)).wait()
            self._dropped = []
        self._in_flight.append(self.worker.execute(step))

    def _encode(self, mm_hash: bytes) -> EncoderInput:
        self.encoded.add(mm_hash)
        return self._placed[mm_hash]

    @staticmethod
    def _describe(request_id: str, request: _Request) -> NewRequestData:
        return NewRequestData(
            request_id, list(request.token_ids), len(request.prompt.token_ids), request.prompt.features, request.params,
            list(request.block_ids), request.computed,
        )

    def collect(self) -> ModelRunnerOutput:
        """The result of the oldest step in flight, applied."""
        output = self._in_flight.popleft().wait()
        for request_id, token_id in zip(output.request_ids, output.sampled_token_ids, strict=True):
            if request_id in self.requests:
                self.requests[request_id].token_ids.append(token_id)
                if output.logprobs and request_id in output.logprobs:
                    self.requests[request_id].logprobs.append(output.logprobs[request_id])
        return output

    def step(self, num_scheduled_tokens: dict[str, int]) -> ModelRunnerOutput:
        self.launch(num_scheduled_tokens)
        return self.collect()

    def output_of(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        return request.token_ids[len(request.prompt.token_ids) :]

    def first_logits(self, prompt: Prompt, chunk: int = 1 << 30) -> torch.Tensor:
        """What the first token of the answer is chosen from, caught on its way to the sampler."""
        caught: list[torch.Tensor] = []
        model = self.worker.model
        compute = model.compute_logits
        model.compute_logits = lambda hidden: caught.append(compute(hidden)) or caught[-1]  # type: ignore[method-assign]
        self.add("a", prompt)
        self.run(1, chunk=chunk)
        self.finish("a")
        model.compute_logits = compute  # type: ignore[method-assign]
        assert len(caught) == 1
        return caught[0][0].cpu()

    def run(self, max_tokens: int, *, chunk: int = 1 << 30, depth: int = 1) -> dict[str, list[int]]:
        """Run every request until it has `max_tokens` of output, with `depth` steps in flight and chunks of at most `chunk`."""
        while True:
            plan = {}
            for request_id, request in self.requests.items():
                room = len(request.prompt.token_ids) + max_tokens - request.num_expected
                waiting = request.num_expected - request.computed
                if waiting > 0 and (room > 0 or request.num_expected == len(request.prompt.token_ids)):
                    plan[request_id] = min(chunk, waiting)
            if plan:
                self.launch(plan)
            if not plan and not self._in_flight:
                return {request_id: self.output_of(request_id) for request_id in self.requests}
            if len(self._in_flight) >= depth or not plan:
                self.collect()
