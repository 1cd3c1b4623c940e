"""The periodic lines of the log: rates of the engine, and where pictures spend their time."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mmv1.api import server
from mmv1.api.statistics import BottleneckLine, StatisticsLine
from mmv1.preprocess.pictures import PreprocessStats
from mmv1.preprocess.timings import STAGES, Stage, StageTimings
from mmv1.types import SchedulerStats
from tests.api.fake_llm import FakeLLM
from tests.api.test_server import served


def test_statistics_line_has_rates_and_is_silent_when_idle() -> None:
    statistics = StatisticsLine("cpu")
    assert statistics.next(SchedulerStats(), PreprocessStats(), 10) is None
    busy = SchedulerStats(
        num_steps=9, num_running=1, num_kv_blocks=4, num_kv_blocks_used=1, num_generation_tokens=50,
        num_prompt_tokens_computed=200, prefix_cache_queries=10, prefix_cache_hits=4,
        encoder_cache_bytes=30, encoder_cache_capacity_bytes=120,
    )  # fmt: skip
    decoded = PreprocessStats(num_decodes=3, decode_seconds=0.06, num_slab_hits=1, num_store_hits=2)
    line = statistics.next(busy, decoded, 10)
    assert "prompt throughput: 20.0 tokens/s" in line
    assert "generation throughput: 5.0 tokens/s" in line
    assert "Running: 1 reqs, Waiting: 0 reqs" in line
    assert ", KV cache usage: 25.0%" in line
    assert "Prefix cache hit rate: 40.0%" in line
    assert "MM cache hit rate: 50.0%" in line
    assert "Encoder cache usage: 25.0%" in line
    assert "Encoder cache hit rate: -" in line
    assert "3 images decoded, 20.0 ms each" in line
    busy_without_progress = SchedulerStats(num_steps=9, num_running=1)
    assert statistics.next(busy_without_progress, decoded, 10) is not None
    assert statistics.next(SchedulerStats(num_steps=9), decoded, 10) is None


def test_the_kv_cache_of_a_gpu_has_vllms_name() -> None:
    line = StatisticsLine("NVIDIA H100 80GB HBM3").next(SchedulerStats(num_steps=1), PreprocessStats(), 10)
    assert "GPU KV cache usage: 0.0%" in line


def timings_of(**seconds: list[float]) -> StageTimings:
    timings = StageTimings()
    for stage in STAGES:
        for one in seconds.get(stage, ()):
            timings.observe(stage, one)
    return timings


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("fetch", "downloads: "),
        ("slab", "room in the slab: raise --preprocess-slab-gb"),
        ("store_get", "Redis: look at its latency and at the network (3 failures, 2 waits for another server)"),
        ("queue", "waiting for a decoder: raise --preprocess-workers (now 4, 2.5% busy)"),
        ("decode", "decoding itself: "),
        ("resize", "resizing: "),
    ],
)
def test_every_stage_can_be_the_bottleneck(stage: Stage, words: str) -> None:
    seconds = {name: [1.0] for name in STAGES} | {stage: [6.0 if stage not in ("decode", "resize") else 5.0], "store_set": [99.0]}
    if stage == "queue":
        seconds |= {"decode": [2.0], "resize": [4.0], "queue": [7.0]}
    stats = PreprocessStats(num_images_probed=1, num_decodes=1, num_store_failures=3, num_lease_waits=2)
    line = BottleneckLine(4).next(stats, timings_of(**seconds), 60)
    assert line is not None
    share = seconds[stage][0] / (sum(map(sum, seconds.values())) - 99)
    assert f"bottleneck: {100 * share:.1f}% of the time is {words}" in line
    assert "store_set 99000.0 (1)" in line


def test_the_line_is_about_the_time_since_the_last_one() -> None:
    line, timings = BottleneckLine(2), StageTimings()
    assert line.next(PreprocessStats(), timings, 60) is None
    for _ in range(100):
        timings.observe("queue", 5.0)
    assert "100.0% of the time is waiting for a decoder" in str(line.next(PreprocessStats(num_decodes=100), timings, 60))
    now = PreprocessStats(num_images_probed=9, num_decodes=103, num_slab_hits=4, num_store_hits=2)
    assert line.next(PreprocessStats(num_decodes=100), timings, 60) is None
    for seconds in (0.010, 0.020):
        timings.observe("decode", seconds)
    timings.observe("fetch", 0.005)
    text = line.next(now, timings, 60)
    assert text is not None
    assert "9 came; ready: 4 from the slab, 2 from Redis, 3 decoded; mean ms (pictures): fetch 5.0 (1), decode 15.0 (2); " in text
    assert "85.7% of the time is decoding" in text


def test_a_stage_that_is_slow_for_few_pictures_is_no_bottleneck() -> None:
    timings = timings_of(fetch=[2.0], queue=[0.1] * 1000)
    assert "is waiting for a decoder" in str(BottleneckLine(1).next(PreprocessStats(num_decodes=1000), timings, 60))


def test_pictures_that_waited_for_nothing_have_no_bottleneck() -> None:
    text = BottleneckLine(1).next(PreprocessStats(num_images_probed=5, num_slab_hits=5), StageTimings(), 60)
    assert text == "Pictures: 5 came; ready: 5 from the slab, 0 from Redis, 0 decoded; mean ms (pictures): -; bottleneck: none"


def test_a_download_that_failed_is_seen_though_no_picture_came() -> None:
    assert "is downloads" in str(BottleneckLine(1).next(PreprocessStats(), timings_of(fetch=[10.0]), 60))


def test_the_server_logs_both_lines(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_STATISTICS_INTERVAL_S", 0.01)
    monkeypatch.setattr(server, "_BOTTLENECK_INTERVAL_S", 0.01)
    caplog.set_level(logging.INFO, "mmv1")
    llm.preprocessor.timings.observe("queue", 1.0)

    async def main() -> None:
        async with served(llm):
            async with asyncio.timeout(10):
                while not ("Avg prompt throughput" in caplog.text and "--preprocess-workers" in caplog.text):
                    await asyncio.sleep(0.005)

    asyncio.run(main())
    assert f"now {llm.config.preprocess.num_workers}, " in caplog.text
    assert caplog.text.count("bottleneck: ") == 1
