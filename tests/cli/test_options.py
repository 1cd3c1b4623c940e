"""The command line: every setting is an option, errors are one sentence, and help comes at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mmv1
from mmv1.api import cli
from mmv1.config import EngineArgs
from tests.api.fake_llm import make_model_dir


def parse(*arguments: str) -> EngineArgs:
    return cli._engine_args(cli.make_parser().parse_args(["serve", "some/model", *arguments]))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from mmv1.api.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_without_options_the_defaults_hold() -> None:
    assert parse() == EngineArgs(model="some/model")
    assert cli._engine_args(cli.make_parser().parse_args(["serve"])) == EngineArgs()  # the demo model


def test_every_setting_is_an_option() -> None:
    given = {
        "served_model_name": "m", "dtype": "float16", "load_format": "dummy", "max_model_len": 9, "seed": 3, "max_num_seqs": 4,
        "max_num_batched_tokens": 5, "scheduling_policy": "priority", "max_num_encoder_tokens": 6, "block_size": 32,
        "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 7, "num_gpu_blocks_override": 8, "enable_prefix_caching": False,
        "encoder_cache_bytes": 10, "limit_mm_per_prompt": {"image": 4}, "max_pixels": 11, "min_pixels": 12,
        "preprocess_workers": 2, "preprocess_slab_gb": 0.25, "hash_algorithm": "xxh3",
        "allowed_media_domains": ["a.org", "b.org"], "allowed_local_media_path": "/media", "media_fetch_timeout_s": 2.5,
        "extra_image_formats": ["bmp", "tiff"],
        "redis_url": "redis://r:1/2", "redis_ttl_s": 13, "redis_min_bytes": 14, "cache_secret_file": "/secret",
    }  # fmt: skip
    assert {"model", *given} == {field.name for field in dataclasses.fields(EngineArgs)}
    arguments = []
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is False:
            arguments.append(option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            arguments += [option, '{"image": 4}']
        elif isinstance(value, list):
            arguments += [option, *value]
        else:
            arguments += [option, str(value)]
    assert parse(*arguments) == EngineArgs(model="some/model", **given)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dtype", "int4"),
        ("--limit-mm-per-prompt", "4"),
        ("--limit-mm-per-prompt", "{"),
        ("--limit-mm-per-prompt", '{"image": true}'),
        ("--limit-mm-per-prompt", '{"image": -1}'),
        ("--max-num-seqs", "many"),
        ("--surprise",),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_and_version_come_at_once() -> None:
    start = time.monotonic()
    helped = run("--help")
    elapsed = time.monotonic() - start
    assert helped.returncode == 0
    assert "serve" in helped.stdout
    assert elapsed < 5  # a third of a second on an idle machine
    assert run("--version").stdout.strip() == f"mmv1 {mmv1.__version__}"


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "import sys; from mmv1.api.cli import make_parser; make_parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert not {"torch", "fastapi", "uvicorn", "numpy", "zmq", "tokenizers", "PIL"} & set(modules)


def test_serve_help_shows_headings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for heading in ("Server:", "Model:", "Scheduler:", "Memory:", "Pictures:"):
        assert heading in text
    assert "(default: 256)" in text


def test_settings_that_cannot_work_are_one_sentence(tmp_path: Path) -> None:
    make_model_dir(tmp_path)
    for arguments in (
        ("/no/such/model",),
        (str(tmp_path), "--max-model-len", "100000"),
        (str(tmp_path), "--host", "192.0.2.1"),
        (str(tmp_path), "--port", "99999"),
    ):
        failed = run("serve", *arguments)
        assert failed.returncode == 2
        assert failed.stderr.startswith("mmv1: ")
        assert failed.stderr.count("\n") == 1
        assert "Traceback" not in failed.stderr
