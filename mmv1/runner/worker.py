"""One rank: a device, a model on it, its caches and its runner. The executor's short face to all of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from mmv1.config import EngineConfig
from mmv1.encoder_cache.tensors import EncoderCacheTensors
from mmv1.errors import EngineError
from mmv1.host import available_memory_bytes
from mmv1.kv.tensors import allocate_kv_caches
from mmv1.log import logger
from mmv1.models.interface import Model
from mmv1.models.registry import load_model
from mmv1.runner.attention import make_backend
from mmv1.runner.encoder_runner import map_pixel_slab
from mmv1.runner.model_runner import ModelRunner, PendingOutput
from mmv1.runner.platform import Platform
from mmv1.step import CachedRequestData, KVCacheSpec, NewRequestData, SchedulerOutput
from mmv1.types import SamplingParams

_MOST_CPU_KV_BYTES = 4 << 30


class Worker:
    """Call in this order: init_device, load_model, then the questions, initialize_caches, and execute from then on, from one
    thread at a time.

    `pixel_slab_fd`: the file of the pixel slab, mapped read-only; None for an engine that takes no pictures.
    """

    def __init__(self, config: EngineConfig, pixel_slab_fd: int | None) -> None:
        self._config = config
        self._pixel_slab_fd = pixel_slab_fd
        self._pixel_slab: np.ndarray | None = None
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._profiler: torch.profiler.profile | None = None

    def init_device(self) -> None:
        """Choose the device and map the pixel slab."""
        self.platform = Platform()
        self.backend = make_backend(self.platform.default_attention_backend)
        if self._pixel_slab_fd is not None:
            self._pixel_slab = map_pixel_slab(self._pixel_slab_fd)

    @property
    def device_name(self) -> str:
        return self.platform.name

    @property
    def attention_backend_name(self) -> str:
        return self.backend.name

    def load_model(self) -> None:
        """Raises ConfigError when the model directory does not fit what is supported."""
        self.model: Model = load_model(self._config.model, self.platform.device)

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
        embeddings, or `least_encoder_bytes` where that is more.
        """
        cache = self._config.cache
        if self.platform.is_cuda:
            self.platform.start_measuring()
            self._run_largest_step()
            return self.platform.measured_free_bytes(cache.gpu_memory_utilization)
        most_blocks = self._config.scheduler.max_num_seqs * math.ceil(self._config.model.max_model_len / cache.block_size) + 1
        usable = most_blocks * cache.block_size * self.get_kv_cache_specs()[0].bytes_per_token()
        kv_bytes = min(_MOST_CPU_KV_BYTES, usable)
        share = int(available_memory_bytes() * cache.gpu_memory_utilization)
        return min(share, kv_bytes + max(kv_bytes // 4, least_encoder_bytes))

    def initialize_caches(self, num_blocks: int, encoder_cache_bytes: int) -> None:
        """Take the memory. `num_blocks` counts the null block."""
        self._runner = self._make_runner(num_blocks, encoder_cache_bytes)
        logger.info(
            "%s, %s, attention backend %s: %d KV blocks of %d tokens, %.1f MiB of picture embeddings",
            self.platform.name, self._config.model.dtype, self.backend.name, num_blocks, self._config.cache.block_size,
            encoder_cache_bytes / (1 << 20),
        )

    def execute(self, step: SchedulerOutput) -> PendingOutput:
        """Launch a step; its result is had from `PendingOutput.wait`, on any thread."""
        return self._runner.execute(step)

    def profile(self, trace_dir: str | None) -> None:
        """Start recording into `trace_dir` (made if missing), or with None stop and write the trace there."""
        if trace_dir is None:
            if self._profiler is None:
                raise EngineError("no profile is being recorded")
            self._profiler.stop()
            self._profiler = None
            return
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
        return ModelRunner(
            self.model,
            self.platform,
            self.backend,
            allocate_kv_caches(spec, num_blocks, block_size, self._dtype, device),
            EncoderCacheTensors(encoder_cache_bytes, self.model.embedding_width, self._dtype, device),
            self._pixel_slab,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            max_model_len=self._config.model.max_model_len,
            block_size=block_size,
            seed=self._config.model.seed,
        )

    @torch.inference_mode()
    def _run_largest_step(self) -> None:
        """A picture of the whole encoder budget, then a step of the whole token budget in which every request draws from a
        limited vocabulary. All keys go to the null block."""
        scheduler, merge = self._config.scheduler, self.model.spatial_merge_size
        if self.model.patch_bytes:
            side = math.isqrt(scheduler.max_num_encoder_tokens) * merge
            patches = torch.zeros(side * side, self.model.patch_bytes, dtype=torch.uint8, device=self.platform.device)
            self.model.encode_images(patches, [(1, side, side)], self.backend)
        runner = self._make_runner(1, 0)
        num_seqs = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        num_tokens = min(scheduler.max_num_batched_tokens // num_seqs, self._config.model.max_model_len)
        block_ids = [0] * math.ceil(num_tokens / self._config.cache.block_size)
        params = SamplingParams(top_p=0.9, repetition_penalty=1.1)
        requests = [
            NewRequestData(f"largest-{i}", [0] * num_tokens, num_tokens, [], params, block_ids, 0) for i in range(num_seqs)
        ]
        step = SchedulerOutput(
            step_id=0,
            num_scheduled_tokens={request.request_id: num_tokens for request in requests},
            total_num_scheduled_tokens=num_seqs * num_tokens,
            new_requests=requests,
            cached_requests=CachedRequestData([], []),
            encoder_inputs=[],
            free_mm_hashes=[],
            finished_request_ids=[],
        )
        runner.execute(step).wait()
