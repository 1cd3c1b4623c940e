"""The engine's flags: every setting is one, a file can say them too, and what is wrong with them is said in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mmv1.cli import options
from mmv1.cli.main import make_parser
from mmv1.config import EngineArgs
from mmv1.errors import ConfigError

GIVEN: dict[str, Any] = {
    "served_model_name": "m", "dtype": "float16", "load_format": "dummy", "max_model_len": 9, "seed": 3, "max_num_seqs": 4,
    "max_num_batched_tokens": 5, "scheduling_policy": "priority", "max_num_encoder_tokens": 6, "block_size": 32,
    "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 7, "num_gpu_blocks_override": 8, "enable_prefix_caching": False,
    "encoder_cache_bytes": 10, "limit_mm_per_prompt": {"image": 4}, "max_pixels": 11, "min_pixels": 12,
    "mm_processor_kwargs": {"max_pixels": 15}, "preprocess_workers": 2, "preprocess_slab_gb": 0.25, "hash_algorithm": "xxh3",
    "allowed_media_domains": ["a.org", "b.org"], "allowed_local_media_path": "/media", "media_fetch_timeout_s": 2.5,
    "extra_image_formats": ["bmp", "tiff"],
    "attention_backend": "sdpa", "enforce_eager": True, "encoder_stream": False, "fused_kernels": False,
    "torch_profiler_dir": "/traces", "enable_chunked_prefill": False, "async_scheduling": False, "encoder_cache": False,
    "redis_url": "redis://r:1/2", "redis_ttl_s": 13, "redis_min_bytes": 14, "cache_secret_file": "/secret",
}  # fmt: skip

YAML = """
served-model-name: m
dtype: float16
load_format: dummy
max-model-len: 9
seed: 3
max_num_seqs: 4
max-num-batched-tokens: 5
scheduling-policy: priority
max-num-encoder-tokens: 6
block-size: 32
gpu-memory-utilization: 0.5
kv-cache-memory-bytes: 7
num-gpu-blocks-override: 8
enable-prefix-caching: false
encoder-cache-bytes: 10
attention-backend: sdpa
enforce-eager: true
encoder-stream: false
fused-kernels: false
torch-profiler-dir: /traces
enable-chunked-prefill: false
async-scheduling: false
encoder-cache: false
limit-mm-per-prompt: {image: 4}
max-pixels: 11
min-pixels: 12
mm-processor-kwargs:
  max_pixels: 15
preprocess-workers: 2
preprocess-slab-gb: 0.25
hash-algorithm: xxh3
allowed-media-domains: [a.org, b.org]
allowed-local-media-path: /media
media-fetch-timeout-s: 2.5
extra-image-formats:
  - bmp
  - tiff
redis-url: redis://r:1/2
redis-ttl-s: 13
redis-min-bytes: 14
cache-secret-file: /secret
"""


def parse(*arguments: str | Path, command: str = "serve") -> EngineArgs:
    argv = [command, *map(str, arguments)]
    return options.engine_args(make_parser(argv)[0].parse_args(argv))


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_without_options_the_defaults_hold() -> None:
    assert parse() == EngineArgs()  # the demo model
    assert parse("some/model") == EngineArgs(model="some/model")
    assert parse("What?", "--model", "some/model", command="run") == EngineArgs(model="some/model")


def test_every_setting_is_an_option() -> None:
    assert {"model", *GIVEN} == {field.name for field in dataclasses.fields(EngineArgs)}
    arguments = []
    for name, value in GIVEN.items():
        option = "--" + name.replace("_", "-")
        if value is False:
            arguments.append(option.replace("--", "--no-", 1))
        elif value is True:
            arguments.append(option)
        elif isinstance(value, dict):
            arguments += [option, str(value).replace("'", '"')]
        elif isinstance(value, list):
            arguments += [option, *value]
        else:
            arguments += [option, str(value)]
    assert parse("some/model", *arguments) == EngineArgs(model="some/model", **GIVEN)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dtype", "int4"),
        ("--limit-mm-per-prompt", "4"),
        ("--limit-mm-per-prompt", "{"),
        ("--max-num-seqs", "many"),
        ("--max-num-seq", "4"),  # no flag by a part of its name
        ("--surprise",),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_file_can_say_every_setting(tmp_path: Path) -> None:
    path = written(tmp_path, "model: some/model\n" + YAML)
    assert parse("--config", path) == EngineArgs(model="some/model", **GIVEN)
    assert parse("What?", "--config", path, command="run") == EngineArgs(model="some/model", **GIVEN)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model: some/model\nmax-num-seqs: 4\nallowed-media-domains: [a.org]\nenable-prefix-caching: false\n")
    arguments = ("--max-num-seqs", "5", "other/model", "--allowed-media-domains", "b.org", "--enable-prefix-caching")
    expected = EngineArgs(model="other/model", max_num_seqs=5, allowed_media_domains=["b.org"])
    assert parse("--config", path, *arguments) == expected
    assert parse(*arguments, f"--config={path}") == expected


def test_a_file_can_say_what_is_not_the_engines(tmp_path: Path) -> None:
    argv = ["serve", "--config", str(written(tmp_path, "port: 9000\nhost: 0.0.0.0\n"))]
    namespace = make_parser(argv)[0].parse_args(argv)
    assert (namespace.host, namespace.port) == ("0.0.0.0", 9000)


def test_of_flags_that_exclude_each_other_the_command_lines_goes_before_the_files(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt-file: prompt.txt\nmax-tokens: 5\n")
    argv = ["caption", "p", "--prompt", "Why?", "--config", str(path)]
    namespace = make_parser(argv)[0].parse_args(argv)
    assert (namespace.prompt, namespace.prompt_file, namespace.max_tokens) == ("Why?", None, 5)
    path = written(tmp_path, "prompt: Why?\nprompt_file: prompt.txt\n")
    with pytest.raises(ConfigError, match="prompt and prompt-file cannot be given together"):
        make_parser(["caption", "p", "--config", str(path)])


def test_an_empty_file_and_null_say_nothing(tmp_path: Path) -> None:
    assert parse("--config", written(tmp_path, "# nothing\n")) == EngineArgs()
    assert parse("--config", written(tmp_path, "max-model-len: null\nseed:\n")) == EngineArgs()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-modellen: 4", ["max-modellen", "did you mean max-model-len"]),
        ("config: other.yaml", ["'config' is no setting of mmv1 serve"]),
        ("help: true", ["'help' is no setting"]),
        ("no-enable-prefix-caching: true", ["'no-enable-prefix-caching' is no setting"]),
        ("7: 8", ["'7' is no setting"]),
        ("max-model-len: many", ["max-model-len must be a whole number, not 'many'"]),
        ("max_model_len: 4.5", ["max_model_len must be a whole number, not 4.5"]),
        ("max-model-len: true", ["max-model-len must be a whole number, not True"]),
        ("max-model-len: [4]", ["max-model-len must be a whole number, not [4]"]),
        ("gpu-memory-utilization: most", ["gpu-memory-utilization must be a number, not 'most'"]),
        ("served-model-name: {a: b}", ["served-model-name must be text"]),
        ("redis-url: off", ["redis-url must be text, not False"]),  # YAML 1.1: off is no text
        ("dtype: int4", ["dtype must be one of auto, bfloat16, float16, float32, not 'int4'"]),
        ("enable-prefix-caching: 1", ["enable-prefix-caching must be true or false, not 1"]),
        ("limit-mm-per-prompt: 4", ["limit-mm-per-prompt must be a mapping, not 4"]),
        ("allowed-media-domains: a.org", ["allowed-media-domains must be a list, not 'a.org'"]),
        ("allowed-media-domains: [[a.org]]", ["allowed-media-domains must be text, not ['a.org']"]),
        ("- max-model-len", ["must hold settings, one a line"]),
        ("a: [", ["is not YAML"]),
        ("a: !!python/object:os.system x", ["is not YAML"]),
        ("\x00", ["is not YAML"]),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(text: str, words: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        parse("--config", path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        parse("--config", tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"served-model-name: \xe9\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        parse("--config", tmp_path / "latin.yaml")
    with pytest.raises(SystemExit):
        parse("--config")
