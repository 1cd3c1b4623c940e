"""`mmv1 serve` up to where it listens: settings that cannot work, and the line that says which settings there are."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest

from mmv1.api.settings import ServerSettings
from mmv1.cli import serve
from mmv1.cli.main import make_parser
from mmv1.errors import ConfigError
from tests.api.fake_llm import make_model_dir
from tests.cli.command import assert_one_sentence, mmv1
from tests.integration.server import serving


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-model-len", "100000"], ["--max-model-len 100000 is more than the model's 128"]),
        (["--host", "192.0.2.1"], ["cannot listen on 192.0.2.1", "--host"]),
        (["--port", "99999"], ["port 99999: no such port", "--port"]),
        (["--limit-mm-per-prompt", '{"image": true}'], ["--limit-mm-per-prompt", "True"]),
        (["--limit-mm-per-prompt", '{"image": -1}'], ["--limit-mm-per-prompt", "-1"]),
        (["--allowed-origins", "https://example.org"], ["--allowed-origins", "not a JSON list of strings"]),
        (["--allowed-methods", '{"GET": 1}'], ["--allowed-methods", "not a JSON list of strings"]),
        (["--root-path", "gate"], ["--root-path gate must start with a /"]),
        (["--max-queued-requests-per-key", "2"], ["--api-key", "MMV1_API_KEY"]),
        (["--ssl-certfile", "/no/cert.pem"], ["--ssl-keyfile"]),
        (["--ssl-certfile", "/no/cert.pem", "--ssl-keyfile", "/no/key.pem"], ["--ssl-certfile", "No such file"]),
        (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], ["--ssl-certfile", "cannot be used"]),
        (["--mm-processor-kwargs", '{"do_resize": false}'], ["--mm-processor-kwargs", "do_resize"]),
        (["--embedding-model", "ViT-B-32"], ["--embedding-model ViT-B-32 must have the form NAME:WEIGHTS"]),
        (["--embedding-model", "a:b", "--embedding-cache-bytes", "-1"], ["--embedding-cache-bytes -1 must be at least 0"]),
        (["--embedding-model", "ViT-B-32:x", "--served-model-name", "ViT-B-32"], ["both models are named ViT-B-32"]),
        (["--runner", "pooling"], ["--runner pooling", "--embedding-model NAME:WEIGHTS"]),
        (["--runner", "pooling", "--embedding-model", "a:b"], ["--runner pooling serves no language model: leave", "out"]),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    assert_one_sentence(mmv1("serve", make_model_dir(tmp_path), *arguments), *words)


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    assert_one_sentence(mmv1("serve", "/no/such/model"), "no model directory at '/no/such/model'")


def test_an_architecture_that_is_not_supported_is_one_sentence_with_those_that_are(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    supported = ["LlamaForCausalLM", *(f"Qwen{kind}ForCausalLM" for kind in ("2", "3", "3Moe"))]
    supported += [f"Qwen{kind}ForConditionalGeneration" for kind in ("2VL", "2_5_VL", "3VL", "3VLMoe")]
    result = mmv1("serve", model_dir)
    settings, sentence = result.stderr.splitlines()
    assert "Non-default settings" in settings
    assert sentence.startswith("mmv1: architecture 'MambaForCausalLM' is not supported; supported: ")
    assert sentence.partition("supported: ")[2].split(", ") == sorted(supported)
    assert result.returncode == 2


def test_the_log_says_which_settings_are_not_the_defaults(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmv1"):
        said = "m --max-num-seqs 4 --redis-url redis://user:secret@host --port 1 --api-key k"
        for flags in ([], said.split()):
            parser, _ = make_parser(["serve", *flags])
            serve._log_settings(parser.parse_args(["serve", *flags]))
    given = "port=1, api_key='...', model='m', max_num_seqs=4, redis_url='...'"
    assert caplog.messages == ["Non-default settings: none", f"Non-default settings: {given}"]


def settings_of(*argv: str) -> ServerSettings:
    parser, _ = make_parser(["serve", *argv])
    return serve.server_settings(parser.parse_args(["serve", *argv]))


def test_unasked_everything_is_as_the_settings_say() -> None:
    assert settings_of() == ServerSettings()


def test_keys_come_from_the_command_line_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMV1_API_KEY", "three  four")
    assert settings_of("--api-key", "one", "two").api_keys == ("one", "two")
    assert "MMV1_API_KEY" not in os.environ  # and so in no process that decodes pictures
    monkeypatch.setenv("MMV1_API_KEY", "three  four")
    assert settings_of().api_keys == ("three", "four")
    assert settings_of().api_keys == ()


def test_a_file_says_the_same_as_flags(tmp_path: Path) -> None:
    flags = [
        *("--api-key", "one", "two", "--allowed-origins", '["https://a.example", "*"]', "--allow-credentials"),
        *("--max-queued-requests", "7", "--shutdown-timeout", "2.5", "--root-path", "/gate", "--allowed-methods", '["GET"]'),
    ]
    file = tmp_path / "serve.yaml"
    file.write_text(
        'api-key: [one, two]\nallowed-origins: ["https://a.example", "*"]\nallow-credentials: true\nmax-queued-requests: 7\n'
        "shutdown-timeout: 2.5\nroot-path: /gate\nallowed-methods: '[\"GET\"]'\n"
    )
    assert settings_of("--config", str(file)) == settings_of(*flags)
    assert settings_of(*flags).allowed_origins == ("https://a.example", "*")
    file.write_text("allowed-origins: [1]\n")
    with pytest.raises(ConfigError, match="allowed-origins"):
        settings_of("--config", str(file))


@pytest.mark.slow
def test_start_and_stop_as_a_person_sees_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("max-model-len: 512\nmm-processor-kwargs: {max_pixels: 50176}\n")
    with serving(tiny_model_dir, tmp_path, "--config", str(config)) as server:
        assert server.http.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 512
        for words in ("max_model_len=512", "Attention backend: ", "concurrency for 512 tokens", "Application startup complete"):
            assert words in server.log
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=30) == 0  # it was asked to stop, and stopped in order
        assert "Traceback" not in server.log
