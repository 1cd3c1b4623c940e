"""The user's words, and what they resolve to: both config dialects, and one clear sentence for what cannot work."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mmv1.config import DeviceConfig, EngineArgs, EngineConfig, PreprocessConfig, has_cuda_device, resolve
from mmv1.errors import ConfigError

FLAT = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "max_position_embeddings": 4096,
    "vocab_size": 1000,
    "eos_token_id": 5,
    "torch_dtype": "bfloat16",
}
NESTED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "dtype": "bfloat16",
    "text_config": {"max_position_embeddings": 4096, "vocab_size": 1000, "eos_token_id": [5], "dtype": "bfloat16"},
}


def model_dir(tmp_path: Path, config: Any, **files: Any) -> str:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize("config", [FLAT, NESTED], ids=["flat", "nested"])
def test_both_dialects_say_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    model = resolve(EngineArgs(model=model_dir(tmp_path, config))).model
    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (4096, 1000, (5,))
    assert model.architecture == "Qwen2_5_VLForConditionalGeneration"


def test_end_of_sequence_ids_are_the_union(tmp_path: Path) -> None:
    path = model_dir(tmp_path, FLAT, generation_config={"eos_token_id": [7, 8]})
    assert resolve(EngineArgs(model=path)).model.eos_token_ids == (7, 8, 5)


def test_the_type_is_float32_on_a_cpu_and_what_the_user_says_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_dir(tmp_path, FLAT)
    monkeypatch.setattr("mmv1.config.has_cuda_device", lambda: False)
    assert resolve(EngineArgs(model=path)).model.dtype == "float32"
    assert resolve(EngineArgs(model=path, dtype="float16")).model.dtype == "float16"
    monkeypatch.setattr("mmv1.config.has_cuda_device", lambda: True)
    assert resolve(EngineArgs(model=path)).model.dtype == "bfloat16"


def test_a_driver_without_a_device_is_no_cuda_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container on a host with GPUs that was given none: the driver shows, and so may its control device."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert not has_cuda_device(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_cuda_device(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_cuda_device(tmp_path)


def test_extra_image_formats(tmp_path: Path) -> None:
    path = model_dir(tmp_path, FLAT)
    assert resolve(EngineArgs(model=path)).preprocess.extra_image_formats == ()
    config = resolve(EngineArgs(model=path, extra_image_formats=["tiff", "BMP", "tiff"]))
    assert config.preprocess.extra_image_formats == ("TIFF", "BMP")


def test_it_travels_as_msgpack(tmp_path: Path) -> None:
    config = resolve(EngineArgs(model=model_dir(tmp_path, NESTED), allowed_media_domains=["a.example"]))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_model_len": 8192}, "more than the model's 4096"),
        ({"max_model_len": 1}, "at least 2"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_num_batched_tokens": -1}, "--max-num-batched-tokens"),
        ({"block_size": 0}, "--block-size"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        ({"limit_mm_per_prompt": {"video": 1}}, "--limit-mm-per-prompt"),
        ({"extra_image_formats": ["bmp", "pdf"]}, "--extra-image-formats"),
        ({"extra_image_formats": ["png"]}, "--extra-image-formats"),
        ({"limit_mm_per_prompt": {"image": -1}}, "--limit-mm-per-prompt"),
        ({"limit_mm_per_prompt": {"image": "4"}}, "--limit-mm-per-prompt"),
        ({"allowed_local_media_path": "/nowhere/at/all"}, "--allowed-local-media-path /nowhere/at/all is not a directory"),
        ({"allowed_local_media_path": "/etc/passwd"}, "not a directory"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(EngineArgs(model=model_dir(tmp_path, FLAT), **changes))


def test_the_directory_of_local_pictures_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "link").symlink_to("media")
    path = model_dir(tmp_path, FLAT)

    def resolved(given: str | None) -> str | None:
        return resolve(EngineArgs(model=path, allowed_local_media_path=given)).preprocess.allowed_local_media_path

    assert resolved(str(tmp_path / "link" / ".." / "link")) == str((tmp_path / "media").resolve())
    assert resolved(None) is resolved("") is None


WHOLE = [
    "max_model_len", "seed", "max_num_seqs", "max_num_batched_tokens", "max_num_encoder_tokens", "block_size",
    "kv_cache_memory_bytes", "num_gpu_blocks_override", "encoder_cache_bytes", "max_pixels", "min_pixels", "preprocess_workers",
    "redis_ttl_s", "redis_min_bytes",
]  # fmt: skip
NOT_WHOLE = ["gpu_memory_utilization", "preprocess_slab_gb", "media_fetch_timeout_s"]


@pytest.mark.parametrize("name", [*WHOLE, *NOT_WHOLE])
def test_every_number_has_a_range(tmp_path: Path, name: str) -> None:
    """0 never means: choose for me; and no number of the command line ends in a traceback."""
    wrong: list[Any] = [-1, "4", True, 1 << 70, *([1.5] if name in WHOLE else [math.nan, math.inf])]
    path = model_dir(tmp_path, FLAT)
    for value in [*wrong, *([] if name in ("seed", "redis_min_bytes") else [0])]:
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} "):
            resolve(EngineArgs(model=path, **{name: value}))


def test_every_number_was_thought_of() -> None:
    numbers = {f.name for f in dataclasses.fields(EngineArgs) if re.search(r"\b(int|float)\b", str(f.type))}
    assert numbers - {"limit_mm_per_prompt"} == {*WHOLE, *NOT_WHOLE}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**FLAT, "max_position_embeddings": "many"}, "max_position_embeddings"),
        ({**FLAT, "max_position_embeddings": -4}, "max_position_embeddings"),
        ({**FLAT, "max_position_embeddings": 1 << 60}, "max_position_embeddings"),
        ({**FLAT, "vocab_size": [1]}, "vocab_size"),
        ({**FLAT, "vocab_size": True}, "vocab_size"),
        ({**FLAT, "eos_token_id": "five"}, "eos_token_id"),
        ({**FLAT, "eos_token_id": [5, None, {}]}, "eos_token_id"),
        ({**FLAT, "architectures": "One"}, "architectures"),
        ("{", "config.json"),
        ("[1]", "not a JSON object"),
        ({}, "has no config.json"),
        ({"architectures": ["X"]}, "max_position_embeddings"),
        ({**FLAT, "torch_dtype": "float8"}, "dtype"),
    ],
)
def test_model_directories_that_cannot_work_are_named(
    tmp_path: Path, config: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmv1.config.has_cuda_device", lambda: True)
    with pytest.raises(ConfigError, match=says):
        resolve(EngineArgs(model=model_dir(tmp_path, config)))


def test_without_a_name_it_is_the_demo_model() -> None:
    model = resolve(EngineArgs()).model
    assert model.served_model_name == "qwen2.5-vl-demo" and (Path(model.path) / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "one", "a/b/c"])
def test_a_name_that_is_neither_a_directory_nor_a_hub_id(name: str) -> None:
    with pytest.raises(ConfigError, match="no model directory"):
        resolve(EngineArgs(model=name))


def test_a_hub_that_cannot_be_reached_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_args: Any, **_kwargs: Any) -> str:
        raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"'owner/name' is not a local directory and .* the hub cannot be reached"):
        resolve(EngineArgs(model="owner/name"))


def test_redis_comes_from_the_flag_or_the_environment(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preprocess(**args: Any) -> PreprocessConfig:
        return resolve(EngineArgs(model=str(tiny_model_dir), **args)).preprocess

    assert preprocess().redis_url is None
    monkeypatch.setenv("REDIS_URL", "redis://from-the-environment:6379")
    assert preprocess().redis_url == "redis://from-the-environment:6379"
    assert preprocess(redis_url="unix:///run/redis.sock").redis_url == "unix:///run/redis.sock"
    assert preprocess(redis_url="").redis_url is None
    with pytest.raises(ConfigError, match="redis://") as refused:
        preprocess(redis_url="http://user:hunter2@host")
    assert "hunter2" not in str(refused.value)


def test_the_cache_secret_is_read_once_and_never_shown(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"sixteen bytes or more\n")
    config = resolve(EngineArgs(model=str(tiny_model_dir), cache_secret_file=str(path), redis_url="redis://:hunter2@host"))
    assert config.preprocess.cache_secret == b"sixteen bytes or more"
    assert "sixteen" not in repr(config) and "hunter2" not in repr(config)
    path.write_bytes(b"short")
    for bad in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="--cache-secret-file"):
            resolve(EngineArgs(model=str(tiny_model_dir), cache_secret_file=str(bad)))


@pytest.mark.parametrize(
    ("said", "limits"),
    [
        ({"mm_processor_kwargs": {"min_pixels": 3, "max_pixels": 9}}, (3, 9)),
        ({"mm_processor_kwargs": {"size": {"shortest_edge": 3, "longest_edge": 9}}}, (3, 9)),
        ({"mm_processor_kwargs": {"max_pixels": 9, "size": {"longest_edge": 7}}}, (None, 9)),
        ({"mm_processor_kwargs": {"max_pixels": 9, "size": None}, "max_pixels": 8}, (None, 8)),
        ({"mm_processor_kwargs": {}, "min_pixels": 2}, (2, None)),
    ],
)
def test_pixel_limits_in_vllms_words(said: dict[str, Any], limits: tuple[int | None, int | None], tmp_path: Path) -> None:
    config = resolve(EngineArgs(model=model_dir(tmp_path, FLAT), **said)).preprocess
    assert (config.min_pixels, config.max_pixels) == limits


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"size": {"height": 3}}, "height"),
        ({"size": 3}, "size"),
        ({"max_pixels": "9"}, "--max-pixels"),
        ({"max_pixels": 0}, "--max-pixels"),
        ({"size": {"longest_edge": True}}, "--max-pixels"),
    ],
)
def test_other_processor_kwargs_are_refused(kwargs: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        resolve(EngineArgs(model=model_dir(tmp_path, FLAT), mm_processor_kwargs=kwargs))


# ---- how steps are run ----


def test_mechanisms_are_on_unless_switched_off(tmp_path: Path) -> None:
    config = resolve(EngineArgs())
    assert config.device == DeviceConfig()
    assert config.scheduler.enable_chunked_prefill and config.scheduler.async_scheduling and config.cache.encoder_cache
    args = EngineArgs(
        enforce_eager=True, encoder_stream=False, fused_kernels=False, attention_backend="sdpa", encoder_cache=False,
        async_scheduling=False, torch_profiler_dir=f"{tmp_path}/a/../traces",
    )  # fmt: skip
    config = resolve(args)
    assert config.device == DeviceConfig(
        attention_backend="sdpa", enforce_eager=True, encoder_stream=False, fused_kernels=False,
        torch_profiler_dir=str(tmp_path / "traces"),
    )  # fmt: skip
    assert not config.scheduler.async_scheduling and not config.cache.encoder_cache


def test_without_chunked_prefill_the_longest_prompt_fits_in_a_step() -> None:
    most = resolve(EngineArgs()).model.max_model_len
    assert resolve(EngineArgs(enable_chunked_prefill=False)).scheduler.max_num_batched_tokens == most > 2048
    given = EngineArgs(enable_chunked_prefill=False, max_model_len=512, max_num_batched_tokens=512)
    assert resolve(given).scheduler.max_num_batched_tokens == 512
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens .511. must be at least --max-model-len .512."):
        resolve(EngineArgs(enable_chunked_prefill=False, max_model_len=512, max_num_batched_tokens=511))
