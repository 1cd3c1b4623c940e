"""How the device's memory is divided, with a worker that has whatever the test says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from mmv1.config import EngineArgs, EngineConfig, resolve
from mmv1.engine.core_process import lay_out_memory
from mmv1.errors import ConfigError
from mmv1.runner.worker import Worker
from mmv1.step import KVCacheSpec

SPEC = KVCacheSpec(layer_names=("a", "b"), num_kv_heads=2, head_dim=8, dtype_bytes=4)
BLOCK_BYTES = SPEC.bytes_per_token() * 16
EMBEDDING_BYTES = 256
IMAGE_TOKENS = 160
LARGEST_IMAGE = (IMAGE_TOKENS + 16) * EMBEDDING_BYTES


@dataclass
class FakeWorker:
    available: int

    def get_kv_cache_specs(self) -> list[KVCacheSpec]:
        return [SPEC]

    def get_embedding_bytes_per_token(self) -> int:
        return EMBEDDING_BYTES

    def determine_memory(self, least_encoder_bytes: int) -> int:
        return self.available


def config(model_dir: Path, **args: Any) -> EngineConfig:
    return resolve(EngineArgs(model=str(model_dir), **args))


def lay_out(settings: EngineConfig, available: int) -> tuple[int, int, int]:
    return lay_out_memory(settings, cast(Worker, FakeWorker(available)), IMAGE_TOKENS)


def test_an_eighth_is_for_pictures_and_the_rest_for_kv(tiny_model_dir: Path) -> None:
    num_blocks, encoder_bytes, max_model_len = lay_out(config(tiny_model_dir), 1 << 30)
    assert encoder_bytes == 1 << 27
    assert num_blocks == ((1 << 30) - (1 << 27)) // BLOCK_BYTES
    assert max_model_len == 4096


def test_two_largest_pictures_have_room_at_least(tiny_model_dir: Path) -> None:
    available = 4 * LARGEST_IMAGE
    num_blocks, encoder_bytes, max_model_len = lay_out(config(tiny_model_dir), available)
    assert encoder_bytes == 2 * LARGEST_IMAGE
    assert num_blocks == (available - encoder_bytes) // BLOCK_BYTES
    assert max_model_len == (num_blocks - 1) * 16 < 4096  # lowered, since nobody asked for 4096


def test_a_context_that_was_asked_for_is_not_lowered(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 4096"):
        lay_out(config(tiny_model_dir, max_model_len=4096), 4 * LARGEST_IMAGE)


@pytest.mark.parametrize(
    ("encoder_bytes", "says"),
    [(1 << 45, "lower --encoder-cache-bytes"), (1 << 30, "lower --encoder-cache-bytes"), (1000, "raise --encoder-cache-bytes")],
)
def test_an_encoder_cache_that_cannot_be_names_its_flag(tiny_model_dir: Path, encoder_bytes: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lay_out(config(tiny_model_dir, encoder_cache_bytes=encoder_bytes), 1 << 30)


def test_what_was_given_is_taken(tiny_model_dir: Path) -> None:
    settings = config(tiny_model_dir, encoder_cache_bytes=LARGEST_IMAGE, kv_cache_memory_bytes=300 * BLOCK_BYTES + 5)
    assert lay_out(settings, 1 << 30) == (300, LARGEST_IMAGE, 4096)
    settings = replace(settings, cache=replace(settings.cache, num_gpu_blocks_override=257))
    assert lay_out(settings, 1 << 30) == (257, LARGEST_IMAGE, 4096)


@pytest.mark.parametrize("args", [
    {"max_num_seqs": 1, "max_model_len": 4096}, {"max_num_seqs": 1, "max_model_len": 256}, {"max_num_seqs": 1},
    {"max_num_seqs": 3, "max_model_len": 100, "encoder_cache_bytes": 1 << 20}, {"max_num_seqs": 64, "max_model_len": 1000},
])  # fmt: skip
def test_on_a_cpu_there_is_kv_for_all_requests_beside_the_pictures(
    tiny_model_dir: Path, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cap on what a CPU's caches take is on the KV; embeddings are not taken off what the requests need."""
    monkeypatch.setattr("mmv1.runner.worker.available_memory_bytes", lambda: 20 << 30)
    settings = config(tiny_model_dir, **args)
    worker = Worker(settings, None)
    worker.init_device()
    if worker.platform.is_cuda:
        pytest.skip("needs a machine without an accelerator")
    worker.load_model()
    num_blocks, encoder_bytes, max_model_len = lay_out_memory(settings, worker, IMAGE_TOKENS)
    assert max_model_len == settings.model.max_model_len
    blocks_a_request = -(-max_model_len // 16)
    assert num_blocks > settings.scheduler.max_num_seqs * blocks_a_request
    assert num_blocks < 2 * settings.scheduler.max_num_seqs * blocks_a_request + encoder_bytes // BLOCK_BYTES + 2
