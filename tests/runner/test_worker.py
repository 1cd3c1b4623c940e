"""The worker's face: what it says of its model and memory, dummy weights, traces, and pixels it will not read."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmv1 import kernels
from mmv1.errors import ConfigError, EngineError
from mmv1.kernels import toolchain
from mmv1.runner.input_batch import InputBatch
from mmv1.runner.model_runner import ModelRunner
from mmv1.runner.worker import Worker
from mmv1.step import EncodeBatch, EncoderInput, KVCacheSpec
from tests.runner.driver import Driver, Prompt, make_picture, make_prompt, tiny_config

MakeDriver = Callable[..., Driver]


def make_worker(model_dir: Path, **args: object) -> Worker:
    worker = Worker(tiny_config(model_dir, **args), None)
    worker.init_device()
    worker.load_model()
    return worker


def test_it_says_what_its_caches_need(tiny_model_dir: Path) -> None:
    worker = make_worker(tiny_model_dir)
    (spec,) = worker.get_kv_cache_specs()
    assert spec == KVCacheSpec(
        layer_names=tuple(f"model.layers.{i}.self_attn" for i in range(len(spec.layer_names))),
        num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, dtype_bytes=4,
    )
    width = worker.model.embedding_width
    assert worker.get_embedding_bytes_per_token() == 4 * width
    assert (worker.device_name, worker.attention_backend_name) == ("cpu", "sdpa")


def test_the_log_counts_the_blocks_that_requests_can_have(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = make_worker(tiny_model_dir, load_format="dummy")
    with caplog.at_level(logging.INFO, "mmv1"):
        worker.initialize_caches(5, 0)
    assert ": 4 KV blocks of 16 tokens" in caplog.messages[-1]  # one of the five is the null block


def test_memory_on_a_cpu_is_what_is_usable_within_bounds(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(tiny_model_dir, max_num_seqs=4, max_model_len=100, block_size=16, gpu_memory_utilization=0.5)
    per_token = worker.get_kv_cache_specs()[0].bytes_per_token()
    usable = (4 * 7 + 1) * 16 * per_token
    assert worker.determine_memory(usable) == 2 * usable
    assert worker.determine_memory(1) == usable + usable // 4
    assert worker.determine_memory(0) == usable  # a model without pictures
    monkeypatch.setattr("mmv1.runner.worker.available_memory_bytes", lambda: 1000)
    assert worker.determine_memory(0) == 500


def test_a_device_is_measured_with_the_whole_budget(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with a single token, whose kernels are others."""
    worker = make_worker(tiny_model_dir, max_num_seqs=7, max_num_batched_tokens=100, load_format="dummy")
    runner = worker._make_runner(1, 0)
    sizes: list[int] = []
    forward = runner._forward
    monkeypatch.setattr(runner, "_forward", lambda inputs: sizes.append(inputs.num_tokens) or forward(inputs))
    worker._run_steps(runner)
    assert sizes == [100, 1, 64]
    encode = worker.model.encode_images
    monkeypatch.setattr(worker.model, "encode_images", lambda patches, *a: sizes.append(len(patches)) or encode(patches, *a))
    worker._encode_largest()
    assert sizes[3:] == [worker._config.scheduler.max_num_encoder_tokens * 4]


def test_nothing_is_recorded_before_the_tables_are_filled(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are filled on another stream than the one that records, which does not wait for it."""
    worker = make_worker(tiny_model_dir, load_format="dummy")
    order: list[str] = []
    monkeypatch.setattr(Worker, "_uses_graphs", True)
    monkeypatch.setattr(worker.platform, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr("mmv1.runner.model_runner.InputBatch", lambda *a, **k: order.append("tables") or InputBatch(*a, **k))
    monkeypatch.setattr(ModelRunner, "record", lambda *_: order.append("record"))
    worker.initialize_caches(2, 0)
    assert order == ["tables", "synchronize", "record", "synchronize"]


def test_experts_in_plain_torch_are_not_recorded(
    tiny_model_dirs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the device to say who chose whom."""
    recorded: list[str] = []
    for family in ("qwen3_moe", "qwen3"):
        worker = make_worker(tiny_model_dirs(family), load_format="dummy")
        monkeypatch.setattr(Worker, "_uses_graphs", True)
        monkeypatch.setattr(ModelRunner, "record", lambda *_, family=family: recorded.append(family))
        worker.initialize_caches(2, 0)
        monkeypatch.undo()
    assert recorded == ["qwen3"]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as choosing kernels goes."""
    cuda = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)
    monkeypatch.setattr("mmv1.runner.worker.Platform", lambda **_: cuda)
    monkeypatch.setattr(kernels._settings, "fused", True)  # and put back


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("still", ["fused_kernels", "attention_backend", "enforce_eager"])
def test_kernels_that_cannot_be_compiled_are_refused_with_the_way_out(
    still: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without: dict[str, object] = {"fused_kernels": False, "attention_backend": "sdpa", "enforce_eager": True}
    uses_triton = tiny_config(tiny_model_dir, **{name: value for name, value in without.items() if name != still})
    monkeypatch.setattr(toolchain, "missing", list)
    Worker(uses_triton, None).init_device()
    monkeypatch.setattr(kernels._settings, "fused", True)
    monkeypatch.setattr(toolchain, "missing", lambda: ["a C compiler", "a place"])
    way_out = "--no-fused-kernels --attention-backend sdpa --enforce-eager"
    with pytest.raises(ConfigError, match=f"needs a C compiler, and a place; .*{way_out}$"):
        Worker(uses_triton, None).init_device()
    Worker(tiny_config(tiny_model_dir, **without), None).init_device()


def test_a_trace_of_steps_on_another_thread_is_written(make_driver: MakeDriver, tmp_path: Path) -> None:
    driver = make_driver()
    with pytest.raises(EngineError, match="no profile"):
        driver.worker.profile(None)
    driver.worker.profile(str(tmp_path / "trace"))
    with pytest.raises(EngineError, match="already"):
        driver.worker.profile(str(tmp_path / "trace"))
    driver.add("a", make_prompt([5], image_token_id=0))
    thread = threading.Thread(target=driver.run, args=(2,))
    thread.start()
    thread.join()
    driver.worker.profile(None)
    (trace,) = (tmp_path / "trace").iterdir()
    assert "scaled_dot_product" in trace.read_text()


@pytest.mark.parametrize("wrong", ["past the end", "too short", "two frames"])
def test_pixels_outside_their_place_are_refused(make_driver: MakeDriver, wrong: str) -> None:
    driver = make_driver(slab_bytes=100_000)
    picture = make_picture(2, 2)
    good = EncoderInput(picture.mm_hash, 0, picture.patches.nbytes, picture.grid_thw, picture.num_tokens)
    offset, nbytes, grid = {
        "past the end": (95_000, good.nbytes, good.grid_thw),
        "too short": (0, good.nbytes - 588, good.grid_thw),
        "two frames": (0, good.nbytes * 2, (2, *good.grid_thw[1:])),
    }[wrong]
    with pytest.raises(EngineError, match="pixel slab"):
        driver.worker.encode(EncodeBatch(1, [EncoderInput(good.mm_hash, offset, nbytes, grid, good.num_tokens)], []))
    driver.worker.encode(EncodeBatch(2, [good], []))


def test_the_slab_is_never_written(make_driver: MakeDriver, image_token_id: int) -> None:
    driver = make_driver()
    driver.add("a", make_prompt([3, make_picture(3, 3), 3], image_token_id=image_token_id))
    slab = driver.worker._pixel_slab
    assert slab is not None
    before = slab.copy()
    driver.run(3)
    assert np.array_equal(slab, before)


def test_dummy_weights_run_a_whole_request(tiny_model_dir: Path, image_token_id: int) -> None:
    driver = Driver(tiny_config(tiny_model_dir, load_format="dummy", dtype="bfloat16"))
    prompt: Prompt = make_prompt([3, make_picture(3, 3), 3], image_token_id=image_token_id)
    driver.add("a", prompt)
    tokens = driver.run(5)["a"]
    driver.close()
    assert len(tokens) == 5
    assert all(0 <= token < driver.worker.model.vocab_size for token in tokens)


def test_importing_the_worker_imports_no_oracle() -> None:
    """transformers and torchvision would cost the engine's start seconds."""
    code = "import sys, mmv1.runner.worker; print(sorted({'transformers', 'torchvision'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
