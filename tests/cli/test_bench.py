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
import uvloop
from PIL import Image

from mmv1.cli.bench_pictures import Pictures
from mmv1.cli.bench_serve import named_load, random_load, save
from mmv1.cli.figures import details_of, figures_of, lines_of
from mmv1.cli.load import LoadClient, Sample, arrival_gaps_s
from mmv1.cli.main import make_parser
from mmv1.cli.workload import WORKLOADS, PictureSize, Prompt, RandomLoad, random_words
from mmv1.engine.output_processor import RequestOutput
from mmv1.errors import ConfigError, EngineError
from tests.api.fake_llm import MODEL, FakeLLM, make_model_dir
from tests.api.test_server import served
from tests.cli.command import assert_one_sentence, mmv1
from tests.integration.server import serving

# ---- the load ----

SMALL = PictureSize(60, 40)


def pictures_of(seed: int = 0, *, count: int = 40, num_images: int = 1, pool_size: int = 1, reuse: float = 0.0) -> list[str]:
    load = RandomLoad(num_words=3, output_len=4, num_images=num_images, sizes=[(SMALL, 1.0)])
    prompts = load.prompts(np.random.default_rng(seed), Pictures(seed, pool_size=pool_size, reuse=reuse))
    return [url for prompt in islice(prompts, count) for url in prompt.pictures]


def picture_of(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def test_pictures_are_as_asked_for() -> None:
    urls = pictures_of(count=4, num_images=3)
    assert len(urls) == len(set(urls)) == 12
    picture = picture_of(urls[0])
    assert (picture.format, picture.size) == ("JPEG", (60, 40))
    assert pictures_of(count=0) == pictures_of(num_images=0) == []


def test_a_seed_makes_the_same_load_again_and_another_seed_another() -> None:
    assert pictures_of(1, reuse=0.5, pool_size=4) == pictures_of(1, reuse=0.5, pool_size=4)
    assert not set(pictures_of(1)) & set(pictures_of(2))
    assert random_words(np.random.default_rng(1), 9) == random_words(np.random.default_rng(1), 9)


def test_pictures_come_from_the_pool_with_the_probability_asked_for() -> None:
    assert len(set(pictures_of(reuse=1.0))) == 1
    assert len(set(pictures_of(reuse=1.0, pool_size=8, count=200))) == 8
    assert 80 < len(set(pictures_of(reuse=0.5, pool_size=4, count=200))) < 120
    assert len(set(pictures_of(reuse=0.0, count=200))) == 200


def test_words_and_messages() -> None:
    load = RandomLoad(num_words=7, num_prefix_words=3, output_len=5, num_images=2, sizes=[(PictureSize(8, 8), 1.0)])
    one, other = islice(load.prompts(np.random.default_rng(0), Pictures(0)), 2)
    assert len(one.text.split()) == 10
    assert one.text.split()[:3] == other.text.split()[:3] and one.text != other.text
    (message,) = one.messages()
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]  # type: ignore[attr-defined]


def test_lengths_and_sizes_are_spread_as_asked_for() -> None:
    sizes = [(PictureSize(20, 10), 0.75), (PictureSize(10, 20), 0.25)]
    load = RandomLoad(num_words=100, output_len=10, range_ratio=0.5, num_images=1, sizes=sizes)
    prompts = list(islice(load.prompts(np.random.default_rng(0), Pictures(0)), 400))
    lengths = {prompt.max_tokens for prompt in prompts}
    assert lengths == set(range(5, 16))
    words = [len(prompt.text.split()) for prompt in prompts]
    assert min(words) >= 50 and max(words) <= 150 and np.mean(words) == pytest.approx(100, rel=0.05)
    wide = sum(prompt.sizes[0] == (20, 10) for prompt in prompts)
    assert 270 < wide < 330
    assert picture_of(prompts[0].pictures[0]).size == prompts[0].sizes[0]


# Requests, at a time, tokens of an answer, pictures of a request, their size.
SHAPES = {
    "caption": (192, 64, 128, 1, (1024, 1024)), "sameimage": (256, 64, 64, 1, (1024, 1024)),
    "multi": (64, 32, 64, 8, (448, 448)), "text": (256, 128, 128, 0, None), "decode": (128, 128, 512, 1, (448, 448)),
    "single": (8, 1, 64, 1, (1024, 1024)),
}  # fmt: skip


def test_workloads_have_their_shapes() -> None:
    assert {
        name: (one.num_prompts, one.max_concurrency, one.output_len, one.num_images, one.size if one.num_images else None)
        for name, one in WORKLOADS.items()
    } == SHAPES
    load = named_load("multi", 0, num_prompts=2, num_warmups=0)
    assert [len(set(prompt.pictures)) for prompt in load.prompts] == [8, 8]
    assert {picture_of(url).size for url in load.prompts[0].pictures} == {(448, 448)}
    assert load.max_concurrency == 32 and load.gaps_s == [0.0, 0.0] and not load.warmups
    text = named_load("text", 0, num_prompts=2, num_warmups=1, output_len=3)
    assert [len(prompt.text.split()) for prompt in text.prompts] == [512, 512]
    assert [prompt.max_tokens for prompt in text.prompts] == [3, 3]
    assert [(prompt.text, prompt.sizes, prompt.max_tokens) for prompt in text.warmups] == [("Hi", [(640, 480)], 8)]


def test_same_pictures_are_asked_about_eight_times_in_no_order() -> None:
    prompts = named_load("sameimage", 0, num_prompts=24, num_warmups=0).prompts
    asked: dict[str, list[str]] = {}
    for prompt in prompts:
        asked.setdefault(prompt.pictures[0], []).append(prompt.text)
    assert [len(set(texts)) for texts in asked.values()] == [8, 8, 8]
    assert len({prompt.pictures[0] for prompt in prompts[:8]}) > 1


def test_arrivals() -> None:
    rng = np.random.default_rng(0)
    assert arrival_gaps_s(rng, 3, math.inf) == [0.0, 0.0, 0.0]
    gaps_s = arrival_gaps_s(rng, 2001, 50.0)
    assert gaps_s[0] == 0.0 and len(gaps_s) == 2001
    assert sum(gaps_s) / 2000 == pytest.approx(1 / 50, rel=0.1)
    assert np.std(gaps_s[1:]) == pytest.approx(1 / 50, rel=0.1)
    assert np.std(arrival_gaps_s(rng, 2001, 50.0, 4.0)[1:]) == pytest.approx(1 / 100, rel=0.1)


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


def test_percentiles_and_goodput() -> None:
    samples = [
        Sample(ttft_s=0.1, itls_s=[0.1], latency_s=0.2, num_prompt_tokens=1, num_output_tokens=2, text="ab"),
        Sample(ttft_s=0.3, itls_s=[0.1], latency_s=0.4, num_prompt_tokens=1, num_output_tokens=2),
        Sample(ttft_s=0.1, itls_s=[0.9], latency_s=1.0, num_prompt_tokens=1, num_output_tokens=2),
        Sample(error="it broke"),
    ]
    goodput_ms = {"ttft": 200.0, "tpot": 200.0}
    figures = figures_of(samples, 0.5, metrics=("ttft",), percentiles=(50.0, 99.9), goodput_ms=goodput_ms)
    assert figures["request_goodput"] == 2.0  # the first alone
    assert figures["p50_ttft_ms"] == pytest.approx(100) and "p99.9_ttft_ms" in figures and "p99_ttft_ms" not in figures
    assert not any(key.endswith("tpot_ms") for key in figures)
    assert "P99.9 TTFT (ms):" in "".join(lines_of(figures))
    assert figures["tokens_per_event"] == 1.0
    assert figures_of(samples, 0.5)["request_goodput"] is None
    details = details_of(samples)
    assert details["errors"] == ["", "", "", "it broke"] and details["generated_texts"][0] == "ab"
    assert details["itls"][2] == [0.9] and details["output_lens"] == [2, 2, 2, 0]


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
    llm: FakeLLM, use: Callable[[LoadClient], Coroutine[Any, Any, Any]], *, ignore_eos: bool = False
) -> Any:
    async def main() -> Any:
        async with served(llm) as server:
            url = f"http://127.0.0.1:{server.port}"
            async with LoadClient(url, ignore_eos=ignore_eos) as client:
                return await use(client)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the command's
        return runner.run(main())


def test_a_request_is_timed_and_counted(llm: WatchedLLM) -> None:
    sample = with_client(llm, lambda client: client.send(MODEL, Prompt("hi", [], 7)), ignore_eos=True)
    assert sample.text == "".join(llm.pieces)
    assert sample.error == ""
    assert (sample.num_prompt_tokens, sample.num_output_tokens) == (5, len(llm.pieces))
    assert sample.latency_s == pytest.approx(sample.ttft_s + sum(sample.itls_s))
    assert 0 < sample.ttft_s < sample.latency_s
    ((_, params, _),) = llm.asked
    assert (params.max_tokens, params.ignore_eos, params.temperature) == (7, True, 0.0)


def test_no_more_than_max_concurrency_are_open(llm: WatchedLLM) -> None:
    async def send_all(client: LoadClient) -> list[Sample]:
        return await client.send_all(MODEL, [Prompt("hi", [], 8)] * 12, gaps_s=[0.0] * 12, max_concurrency=3)

    samples = with_client(llm, send_all)
    assert [sample.error for sample in samples] == [""] * 12
    assert llm.most_running == 3


@pytest.mark.parametrize("fail_before", [0, 2])
def test_what_the_server_says_of_a_failure_is_the_samples_error(llm: WatchedLLM, fail_before: int) -> None:
    llm.fail_before = fail_before
    sample = with_client(llm, lambda client: client.send(MODEL, Prompt("hi", [], 8)))
    assert sample.error and "0xdeadbeef" not in sample.error
    assert sample.error.startswith("503: ") is (fail_before == 0)


def test_models_and_tokenizers_are_asked_for(llm: WatchedLLM) -> None:
    first = with_client(llm, lambda client: client.first_model())
    assert (first.id, first.root) == (MODEL, llm.config.model.path)
    assert with_client(llm, lambda client: client.tokens_per_word(MODEL, lambda count: "a " * count)) == 1.0
    assert [params.max_tokens for _, params, _ in llm.asked] == [1, 1]
    with pytest.raises(EngineError, match="first, short question: 404: The model `other` does not exist"):
        with_client(llm, lambda client: client.tokens_per_word("other", lambda count: "a"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[", "127.0.0.1:9"])
def test_without_a_server_it_is_one_sentence(url: str) -> None:
    async def main() -> str:
        async with LoadClient(url, ignore_eos=False) as client:
            return (await client.first_model()).id

    with pytest.raises(ConfigError, match="start one with mmv1 serve"):
        asyncio.run(main())


# ---- the command ----


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num-prompts", "0"), ("--num-prompts", "x"), ("--request-rate", "0"), ("--request-rate", "nan"),
        ("--mm-reuse", "1.5"), ("--image-size", "100"), ("--image-size", "0x5"), ("--max-concurrency", "-1"),
        ("--random-output-len", "1.5"), ("--random-range-ratio", "1"), ("--burstiness", "0"), ("--goodput", "itl:5"),
        ("--goodput", "ttft"), ("--percentile-metrics", "ttft,x"), ("--metric-percentiles", "50,101"),
        ("--random-mm-bucket-config", "{(4, 4, 2): 1}"), ("--random-mm-bucket-config", "f()"),
        ("--random-mm-bucket-config", "{(4, 4, 1): 0}"), ("--workload", "none"),
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
        save(namespace, {"a": 1}, "made.json")


def parsed(*flags: str) -> Any:
    argv = ["bench", "serve", *flags]
    return make_parser(argv)[0].parse_args(argv)


def test_flags_as_vllm_spells_them() -> None:
    load = random_load(
        parsed(
            "--dataset-name", "random-mm", "--random-input-len", "20", "--random-prefix-len", "10", "--random-output-len", "6",
            "--random-range-ratio", "0.0", "--random-mm-base-items-per-request", "2", "--num-prompts", "3", "--num-warmups", "1",
            "--random-mm-bucket-config", "{(30, 50, 1): 1.0, (9, 9, 16): 0.0}", "--request-rate", "5", "--max-concurrency", "2",
        ), 2.0,
    )  # fmt: skip
    assert [(len(prompt.text.split()), prompt.max_tokens, prompt.sizes) for prompt in load.prompts] == [
        (15, 6, [(50, 30)] * 2)
    ] * 3
    assert (len(load.warmups), load.max_concurrency, load.num_prefix_tokens) == (1, 2, 10)
    assert load.gaps_s[0] == 0.0 and all(load.gaps_s[1:])
    small = parsed("--dataset-name", "random-mm", "--image-size", "9x9", "--num-prompts", "1")
    assert random_load(small, 1.0).prompts[0].sizes == [(9, 9)]
    assert random_load(parsed("--num-prompts", "1"), 1.0).prompts[0].sizes == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--dataset-name", "random", "--num-images", "1"),
        ("--image-size", "9x9", "--random-mm-bucket-config", "{(4, 4, 1): 1}"),
    ],
)
def test_flags_that_contradict_each_other(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--"):
        random_load(parsed(*flags), 1.0)


@pytest.mark.slow
def test_against_a_real_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serving(tiny_model_dir, tmp_path) as server:
        result = mmv1(
            "bench", "serve", "--base-url", f"{server.url}/v1", "--num-prompts", "12", "--num-warmups", "2",
            "--max-concurrency", "4", "--request-rate", "200", "--random-input-len", "150", "--random-output-len", "6",
            "--ignore-eos", "--num-images", "2", "--image-size", "90x60", "--mm-reuse", "0.5", "--mm-pool-size", "4",
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
        assert 0 < figures["achieved_of_floor"] < 0.1  # the server's root told the model; its device is no H100
        assert figures["request_throughput"] == pytest.approx(figures["achieved_of_floor"] * figures["floor_request_throughput"])

        refused = mmv1("bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--random-input-len", "100000")
        assert refused.returncode == 1
        assert "2 requests failed; one of the errors: 400: the prompt" in refused.stderr
