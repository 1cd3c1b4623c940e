"""The worker's face: what it says of its model and memory, dummy weights, traces, and pixels it will not read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmv1.errors import EngineError
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


def test_memory_on_a_cpu_is_what_is_usable_within_bounds(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(tiny_model_dir, max_num_seqs=4, max_model_len=100, block_size=16, gpu_memory_utilization=0.5)
    per_token = worker.get_kv_cache_specs()[0].bytes_per_token()
    usable = (4 * 7 + 1) * 16 * per_token
    assert worker.determine_memory(usable) == 2 * usable
    assert worker.determine_memory(0) == usable + usable // 4
    monkeypatch.setattr("mmv1.runner.worker.available_memory_bytes", lambda: 1000)
    assert worker.determine_memory(0) == 500


def test_the_largest_step_runs(tiny_model_dir: Path) -> None:
    """What a CUDA device is measured with."""
    worker = make_worker(tiny_model_dir, max_num_seqs=7, max_num_batched_tokens=100, load_format="dummy")
    runner = worker._make_runner(1, 0)
    worker._encode_largest()
    worker._run_largest_step(runner)


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
