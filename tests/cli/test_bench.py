"""`mmv1 bench serve`: the load that was asked for, figures that are right, and a run against a real server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmv1.cli import bench
from mmv1.cli.figures import figures_of, lines_of
from mmv1.cli.load import LoadClient, Sample, arrival_gaps_s
from mmv1.cli.main import make_parser
from mmv1.cli.workload import Prompt, random_prompts, random_words
from mmv1.engine.output_processor import RequestOutput
from mmv1.errors import ConfigError, EngineError
from tests.api.fake_llm import MODEL, FakeLLM, make_model_dir
from tests.api.test_server import served
from tests.cli.command import assert_one_sentence, mmv1
from tests.integration.server import serving

# ---- the load ----


def pictures_of(seed: int = 0, *, count: int = 40, num_images: int = 1, reuse: float = 0.0) -> list[str]:
    prompts = random_prompts(np.random.default_rng(seed), num_words=3, num_images=num_images, size=(60, 40), image_reuse=reuse)
    return [url for prompt in islice(prompts, count) for url in prompt.pictures]


def test_pictures_are_as_asked_for() -> None:
    urls = pictures_of(count=4, num_images=3)
    assert len(urls) == len(set(urls)) == 12
    picture = Image.open(io.BytesIO(base64.b64decode(urls[0].removeprefix("data:image/jpeg;base64,"))))
    assert (picture.format, picture.size) == ("JPEG", (60, 40))
    assert pictures_of(count=0) == pictures_of(num_images=0) == []


def test_a_seed_makes_the_same_load_again_and_another_seed_another() -> None:
    assert pictures_of(1) == pictures_of(1)
    assert not set(pictures_of(1)) & set(pictures_of(2))
    assert random_words(np.random.default_rng(1), 9) == random_words(np.random.default_rng(1), 9)


def test_pictures_come_again_with_the_probability_asked_for() -> None:
    assert len(set(pictures_of(reuse=1.0))) == 1
    assert 60 < len(set(pictures_of(reuse=0.5, count=200))) < 140
    assert len(set(pictures_of(reuse=0.0, count=200))) == 200


def test_words_and_messages() -> None:
    (prompt,) = islice(
        random_prompts(np.random.default_rng(0), num_words=7, num_images=2, size=(8, 8), image_reuse=0.0), 1
    )
    assert len(prompt.text.split()) == 7
    (message,) = prompt.messages()
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]  # type: ignore[attr-defined]


def test_arrivals() -> None:
    rng = np.random.default_rng(0)
    assert arrival_gaps_s(rng, 3, math.inf) == [0.0, 0.0, 0.0]
    gaps_s = arrival_gaps_s(rng, 2001, 50.0)
    assert gaps_s[0] == 0.0 and len(gaps_s) == 2001
    assert sum(gaps_s) / 2000 == pytest.approx(1 / 50, rel=0.1)


# ---- the figures ----


def test_figures_of_requests_that_are_known() -> None:
    samples = [
        Sample(ttft_s=0.1, itls_s=[0.2, 0.4], latency_s=0.7, num_prompt_tokens=10, num_output_tokens=3),
        Sample(ttft_s=0.3, itls_s=[], latency_s=0.3, num_prompt_tokens=20, num_output_tokens=1),
        Sample(ttft_s=9.0, latency_s=9.0, num_output_tokens=99, error="it broke"),
    ]
    figures = figures_of(samples, 2.0)
    expected = {
        "duration": 2.0, "completed": 2, "failed": 1, "total_input_tokens": 30, "total_output_tokens": 4,
        "request_throughput": 1.0, "output_throughput": 2.0, "total_token_throughput": 17.0,
        "mean_ttft_ms": 200.0, "median_ttft_ms": 200.0, "std_ttft_ms": 100.0, "p99_ttft_ms": 298.0,
        "mean_tpot_ms": 300.0, "std_tpot_ms": 0.0,  # of the first only: the other has one token
        "mean_itl_ms": 300.0, "median_itl_ms": 300.0, "p99_itl_ms": 398.0,
        "mean_e2el_ms": 500.0, "median_e2el_ms": 500.0, "p99_e2el_ms": 696.0,
    }  # fmt: skip
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert figures["errors"] == ["it broke"]


def test_figures_of_nothing_are_numbers() -> None:
    figures = figures_of([Sample(error="a"), Sample(error="a")], 1.0)
    assert (figures["completed"], figures["failed"], figures["p99_ttft_ms"], figures["errors"]) == (0, 2, 0.0, ["a"])
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, float))


def test_lines_have_vllms_layout() -> None:
    sample = Sample(ttft_s=0.1, itls_s=[0.2], latency_s=0.3, num_prompt_tokens=10, num_output_tokens=2)
    lines = list(lines_of({"max_concurrency": None, "request_rate": "inf", **figures_of([sample], 0.5)}))
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     1" in lines
    assert "Request throughput (req/s):              2.00" in lines
    assert "Median TTFT (ms):                        100.00" in lines
    assert "P99 E2EL (ms):                           300.00" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert not any(line.startswith("Maximum request concurrency") for line in lines)


# ---- the client ----


class WatchedLLM(FakeLLM):
    """Notes the most requests that ran at once."""

    most_running = 0

    async def generate(self, *args: Any, **options: Any) -> AsyncIterator[RequestOutput]:  # type: ignore[override]
        async for output in super().generate(*args, **options):
            self.most_running = max(self.most_running, len(self.running))
            await asyncio.sleep(0.001)
            yield output


@pytest.fixture
def llm(tmp_path: Path) -> WatchedLLM:
    return WatchedLLM(make_model_dir(tmp_path))


def with_client(
    llm: FakeLLM, use: Callable[[LoadClient], Coroutine[Any, Any, Any]], *, max_tokens: int = 8, ignore_eos: bool = False
) -> Any:
    async def main() -> Any:
        async with served(llm) as server:
            url = f"http://127.0.0.1:{server.port}"
            async with LoadClient(url, max_tokens=max_tokens, ignore_eos=ignore_eos) as client:
                return await use(client)

    return asyncio.run(main())


def test_a_request_is_timed_and_counted(llm: WatchedLLM) -> None:
    sample = with_client(llm, lambda client: client.send(MODEL, Prompt("hi", [])), max_tokens=7, ignore_eos=True)
    assert sample.error == ""
    assert (sample.num_prompt_tokens, sample.num_output_tokens) == (5, len(llm.pieces))
    assert sample.latency_s == pytest.approx(sample.ttft_s + sum(sample.itls_s))
    assert 0 < sample.ttft_s < sample.latency_s
    ((_, params, _),) = llm.asked
    assert (params.max_tokens, params.ignore_eos, params.temperature) == (7, True, 0.0)


def test_no_more_than_max_concurrency_are_open(llm: WatchedLLM) -> None:
    async def send_all(client: LoadClient) -> list[Sample]:
        return await client.send_all(MODEL, [Prompt("hi", [])] * 12, gaps_s=[0.0] * 12, max_concurrency=3)

    samples = with_client(llm, send_all)
    assert [sample.error for sample in samples] == [""] * 12
    assert llm.most_running == 3


@pytest.mark.parametrize("fail_before", [0, 2])
def test_what_the_server_says_of_a_failure_is_the_samples_error(llm: WatchedLLM, fail_before: int) -> None:
    llm.fail_before = fail_before
    sample = with_client(llm, lambda client: client.send(MODEL, Prompt("hi", [])))
    assert sample.error and "0xdeadbeef" not in sample.error
    assert sample.error.startswith("503: ") is (fail_before == 0)


def test_models_and_tokenizers_are_asked_for(llm: WatchedLLM) -> None:
    assert with_client(llm, lambda client: client.first_model()) == MODEL
    assert with_client(llm, lambda client: client.tokens_per_word(MODEL, lambda count: "a " * count)) == 1.0
    assert [params.max_tokens for _, params, _ in llm.asked] == [1, 1]
    with pytest.raises(EngineError, match="first, short question: 404: The model `other` does not exist"):
        with_client(llm, lambda client: client.tokens_per_word("other", lambda count: "a"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[", "127.0.0.1:9"])
def test_without_a_server_it_is_one_sentence(url: str) -> None:
    async def main() -> str:
        async with LoadClient(url, max_tokens=1, ignore_eos=False) as client:
            return await client.first_model()

    with pytest.raises(ConfigError, match="start one with mmv1 serve"):
        asyncio.run(main())


# ---- the command ----


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num-prompts", "0"), ("--num-prompts", "x"), ("--request-rate", "0"), ("--request-rate", "nan"),
        ("--image-reuse", "1.5"), ("--image-size", "100"), ("--image-size", "0x5"), ("--max-concurrency", "-1"),
        ("--random-output-len", "1.5"),
    ],
)  # fmt: skip
def test_wrong_numbers_are_one_sentence(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "serve", f"{flag}={value}"]
    with pytest.raises(SystemExit) as stopped:
        make_parser(argv)[0].parse_args(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and flag in said and repr(value) in said and said.count("\n") == 1


def test_no_server_is_said_before_anything_is_made() -> None:
    assert_one_sentence(mmv1("bench", "serve", "--port", "9"), "no server answers at http://127.0.0.1:9", "--base-url")
    assert_one_sentence(mmv1("bench"), "WHAT")


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    argv = ["bench", "serve", "--save-result", "--result-dir", str(tmp_path / "file")]
    namespace = make_parser(argv)[0].parse_args(argv)
    with pytest.raises(ConfigError, match="cannot be written"):
        bench._save(namespace, bench._described(namespace, "m"))


@pytest.mark.slow
def test_against_a_real_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serving(tiny_model_dir, tmp_path) as server:
        result = mmv1(
            "bench", "serve", "--base-url", f"{server.url}/v1", "--num-prompts", "12", "--num-warmups", "2",
            "--max-concurrency", "4", "--request-rate", "200", "--random-input-len", "150", "--random-output-len", "6",
            "--ignore-eos", "--num-images", "2", "--image-size", "90x60", "--image-reuse", "0.5",
            "--save-result", "--result-dir", tmp_path, "--result-filename", "r.json",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "Successful requests:                     12" in result.stdout
        figures = json.loads((tmp_path / "r.json").read_text())
        assert (figures["completed"], figures["failed"], figures["model_id"]) == (12, 0, "tiny")
        assert figures["total_output_tokens"] == 12 * 6
        assert figures["output_throughput"] == pytest.approx(72 / figures["duration"])
        text_tokens = figures["total_input_tokens"] / 12 - 2 * 6 - 20  # two pictures of 6 tokens, and the template
        assert 120 < text_tokens < 190, figures["total_input_tokens"]
        assert server.metrics()["preprocess_images_total"] == 14 * 2
        assert 4 < server.metrics()["preprocess_decodes_total"] < 24  # some came again

        refused = mmv1("bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--random-input-len", "100000")
        assert refused.returncode == 1
        assert "2 requests failed; one of the errors: 400: the prompt" in refused.stderr
