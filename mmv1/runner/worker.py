"""One rank: a device, a model on it, its caches and its runner. The executor's short face to all of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mmv1.config import EngineConfig
from mmv1.encoder_cache.tensors import EncoderCacheTensors
from mmv1.errors import ConfigError, EngineError
from mmv1.host import available_memory_bytes
from mmv1.kernels import disable_fused, uses_fused
from mmv1.kv.tensors import allocate_kv_caches
from mmv1.log import logger
from mmv1.models.interface import Model
from mmv1.models.registry import load_model
from mmv1.runner import step_forward, tower_forward
from mmv1.runner.attention import make_backend
from mmv1.runner.encoder_runner import PendingEncode, map_pixel_slab
from mmv1.runner.model_runner import ModelRunner, PendingOutput
from mmv1.runner.platform import Platform
from mmv1.runner.tower_forward import TowerForward
from mmv1.step import CachedRequestData, EncodeBatch, KVCacheSpec, NewRequestData, SchedulerOutput
from mmv1.types import SamplingParams

_MOST_CPU_KV_BYTES = 4 << 30
_OTHER_TILES = (1, 64, 512)  # steps of so many tokens have kernels of their own (kernels/linear.py, kernels/moe.py)


class Worker:
    """Call in this order: init_device, load_model, then the questions, initialize_caches, and execute from then on, from one
    thread at a time.

    `pixel_slab_fd`: the file of the pixel slab, which is only read; None for an engine that takes no pictures.
    """

    def __init__(self, config: EngineConfig, pixel_slab_fd: int | None) -> None:
        self._config = config
        self._pixel_slab_fd = pixel_slab_fd
        self._pixel_slab: np.ndarray | None = None
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._profiler: torch.profiler.profile | None = None

    def init_device(self) -> None:
        """Choose the device and how it is used, and map the pixel slab. Raises ConfigError for what cannot run here."""
        device = self._config.device
        if not device.fused_kernels:
            disable_fused()
        self.platform = Platform(encoder_stream=device.encoder_stream)
        self.backend = make_backend(device.attention_backend, self.platform.device, self._dtype)
        self._check_toolchain()
        if self._pixel_slab_fd is not None:
            self._pixel_slab = map_pixel_slab(self._pixel_slab_fd)
            # Takes seconds for a large slab, and nothing waits for it: until it is done transfers are slower.
            threading.Thread(target=self.platform.register, args=(self._pixel_slab,), name="register", daemon=True).start()

    def _check_toolchain(self) -> None:
        uses_triton = uses_fused(self.platform.device) or self._uses_graphs or self.backend.name != "sdpa"
        if not (self.platform.is_cuda and uses_triton):
            return
        from mmv1.kernels import toolchain

        if missing := toolchain.missing():
            raise ConfigError(
                f"the GPU kernels are compiled when they are first used, and that needs {', and '.join(missing)}; "
                "without them, slowly: --no-fused-kernels --attention-backend sdpa --enforce-eager"
            )

    @property
    def device_name(self) -> str:
        return self.platform.name

    @property
    def attention_backend_name(self) -> str:
        return self.backend.name

    def load_model(self) -> None:
        """Raises ConfigError when the model directory does not fit what is supported."""
        self.model: Model = load_model(self._config.model, self.platform.device)
        self._tower = TowerForward(self.model, self.platform, self.backend)

    def get_kv_cache_specs(self) -> list[KVCacheSpec]:
        """One group of layers today: all of them."""
        layers = self.model.attention_layers
        return [
            KVCacheSpec(
                layer_names=tuple(layer.name for layer in layers),
                num_kv_heads=layers[0].num_kv_heads,
                head_dim=layers[0].head_dim,
                dtype_bytes=self._dtype.itemsize,
            )
        ]

    def get_embedding_bytes_per_token(self) -> int:
        """Bytes of one picture token's embedding in the encoder cache."""
        return self.model.embedding_width * self._dtype.itemsize

    def determine_memory(self, least_encoder_bytes: int) -> int:
        """Bytes for KV blocks and picture embeddings together. Not positive: the model leaves no room.

        On a CUDA device: what this server's share leaves beside the measured peak of a largest step. On a CPU, within that
        share of the available memory: KV for all requests together, up to a ceiling, and beside it a quarter as much for
        embeddings, or `least_encoder_bytes` where that is more; nothing where that is 0.
        """
        cache = self._config.cache
        if self.platform.is_cuda:
            return self._measure_free_bytes()
        most_blocks = self._config.scheduler.max_num_seqs * math.ceil(self._config.model.max_model_len / cache.block_size) + 1
        usable = most_blocks * cache.block_size * self.get_kv_cache_specs()[0].bytes_per_token()
        kv_bytes = min(_MOST_CPU_KV_BYTES, usable)
        share = int(available_memory_bytes() * cache.gpu_memory_utilization)
        encoder_bytes = max(kv_bytes // 4, least_encoder_bytes) if least_encoder_bytes else 0
        return min(share, kv_bytes + encoder_bytes)

    def initialize_caches(self, num_blocks: int, encoder_cache_bytes: int) -> None:
        """Take the memory. `num_blocks` counts the null block."""
        self._runner = self._make_runner(num_blocks, encoder_cache_bytes)
        self._record_steps(self._runner)
        self.platform.synchronize()
        logger.info(
            "%s, %s, attention backend %s: %d KV blocks of %d tokens, %.1f MiB of picture embeddings",
            self.platform.name, self._config.model.dtype, self.backend.name, num_blocks - 1, self._config.cache.block_size,
            encoder_cache_bytes / (1 << 20),
        )

    def execute(self, step: SchedulerOutput) -> PendingOutput:
        """Launch a step; its result is had from `PendingOutput.wait`, on any thread."""
        return self._runner.execute(step)

    def encode(self, batch: EncodeBatch) -> PendingEncode:
        """Launch the encoding of pictures; may be called on another thread than `execute`."""
        return self._runner.encoder.encode(batch)

    def profile(self, trace_dir: str | None) -> None:
        """Start recording into `trace_dir` (made if missing), or with None stop and write the trace there."""
        if trace_dir is None:
            if self._profiler is None:
                raise EngineError("no profile is being recorded")
            self._profiler.stop()
            self._profiler = None
            return
        if self._profiler is not None:
            raise EngineError("a profile is being recorded already")
        Path(trace_dir).mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.platform.is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        handler = torch.profiler.tensorboard_trace_handler(trace_dir)
        every_thread = torch.profiler._ExperimentalConfig(profile_all_threads=True)  # steps are launched on one of their own
        self._profiler = torch.profiler.profile(
            activities=activities, on_trace_ready=handler, acc_events=True, experimental_config=every_thread
        )
        self._profiler.start()

    def _make_runner(self, num_blocks: int, encoder_cache_bytes: int) -> ModelRunner:
        device, block_size = self.platform.device, self._config.cache.block_size
        (spec,) = self.get_kv_cache_specs()
        runner = ModelRunner(
            self.model,
            self.platform,
            self.backend,
            self._tower,
            allocate_kv_caches(spec, num_blocks, block_size, self._dtype, device),
            EncoderCacheTensors(encoder_cache_bytes, self.model.embedding_width, self._dtype, device),
            self._pixel_slab,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            max_model_len=self._config.model.max_model_len,
            block_size=block_size,
            seed=self._config.model.seed,
        )
        # Weights and tables were filled on the default stream, for which the streams of steps and pictures do not wait: the
        # first of them could read ids of tokens from memory that is still to be zeroed.
        self.platform.synchronize()
        return runner

    @property
    def _uses_graphs(self) -> bool:
        return self.platform.is_cuda and not self._config.device.enforce_eager

    def _record_steps(self, runner: ModelRunner) -> None:
        waits_for_device = self.model.has_experts and not uses_fused(self.platform.device)  # which cannot be recorded
        if self._uses_graphs and not waits_for_device:
            most = self._config.scheduler.max_num_batched_tokens
            runner.record([size for size in step_forward.GRAPH_SIZES if size <= most])

    @torch.inference_mode()
    def _record_tower(self) -> None:
        """Once: unlike a step, a batch of pictures reads no cache."""
        if self._uses_graphs and self.model.patch_bytes and self.backend.name != "sdpa":
            most = self._config.scheduler.max_num_encoder_tokens * self.model.spatial_merge_size**2
            with self.platform.on_encoder_stream():
                self._tower.record([size for size in tower_forward.GRAPH_SIZES if size <= most])

    def _measure_free_bytes(self) -> int:
        """What this server's share of the device leaves beside the measured peak of its largest work: recorded steps, a step
        of the whole token budget and pictures of the whole encoder budget, each on its own stream, so that the memory of one
        does not serve the other."""
        self.platform.start_measuring()
        runner = self._make_runner(1, 0)
        self._record_steps(runner)
        self._record_tower()
        self._encode_largest()
        self._run_steps(runner)
        free_bytes = self.platform.measured_free_bytes(self._config.cache.gpu_memory_utilization)
        del runner
        self.platform.release_unused()
        return free_bytes

    @torch.inference_mode()
    def _encode_largest(self) -> None:
        merge = self.model.spatial_merge_size
        if self.model.patch_bytes:
            with self.platform.on_encoder_stream():
                self._tower([(1, merge, self._config.scheduler.max_num_encoder_tokens * merge)], _blank)

    def _run_steps(self, runner: ModelRunner) -> None:
        """A largest step, and smaller ones, whose kernels are others: they are compiled here and not for the first request. All
        keys go to the null block."""
        scheduler = self._config.scheduler
        num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        each, rest = divmod(scheduler.max_num_batched_tokens, num_seqs)
        most = self._config.model.max_model_len
        largest = [min(each + (i < rest), most) for i in range(num_seqs)]
        finished: list[str] = []
        smaller = [[size] for size in _OTHER_TILES if size < min(most, scheduler.max_num_batched_tokens)]
        for step_id, lengths in enumerate((largest, *smaller)):
            step = self._blank_step(step_id, lengths, finished)
            runner.execute(step).wait()
            finished = list(step.num_scheduled_tokens)

    def _blank_step(self, step_id: int, lengths: Sequence[int], finished_request_ids: list[str]) -> SchedulerOutput:
        """New requests of these lengths, which draw in every way that the sampler does by itself: from all of the vocabulary,
        greedily, from a limited one."""
        limited = SamplingParams(top_p=0.9, repetition_penalty=1.1)
        kinds = {0: SamplingParams(), 1: SamplingParams(temperature=0.0)}
        requests = [
            NewRequestData(
                request_id=f"blank-{step_id}-{i}",
                token_ids=[0] * length,
                num_prompt_tokens=length,
                mm_features=[],
                sampling_params=kinds.get(i, limited),
                block_ids=[0] * math.ceil(length / self._config.cache.block_size),
                num_computed_tokens=0,
            )
            for i, length in enumerate(lengths)
        ]
        return SchedulerOutput(
            step_id=step_id,
            num_scheduled_tokens={request.request_id: request.num_prompt_tokens for request in requests},
            total_num_scheduled_tokens=sum(lengths),
            new_requests=requests,
            cached_requests=CachedRequestData([], []),
            finished_request_ids=finished_request_ids,
        )


def _blank(patches: torch.Tensor) -> None:
    patches.zero_()
