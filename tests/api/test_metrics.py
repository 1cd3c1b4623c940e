"""/metrics and the statistics line: the engine's counters as they are, and what clients feel."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from mmv1.api.metrics import StatisticsLine
from mmv1.preprocess.preprocessor import PreprocessStats
from mmv1.types import SchedulerStats
from tests.api.fake_llm import MODEL, FakeLLM, body, client_of


def scrape(text: str) -> dict[tuple[str, ...], float]:
    """(name, other label values...) -> value."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == MODEL
            rest = [value for label, value in sorted(sample.labels.items()) if label != "model_name"]
            samples[sample.name, *rest] = sample.value
    return samples


def test_metrics(llm: FakeLLM) -> None:
    llm.scheduler_stats = SchedulerStats(
        num_running=2, num_waiting=3, num_kv_blocks=10, num_kv_blocks_used=5, prefix_cache_queries=20, prefix_cache_hits=8,
        encoder_cache_queries=4, encoder_cache_hits=1, encoder_cache_bytes=1000, num_preemptions=6, num_generation_tokens=70,
    )  # fmt: skip

    async def main() -> dict[tuple[str, ...], float]:
        async with client_of(llm) as client:
            await client.post("/v1/chat/completions", json=body(n=2))
            await client.post("/v1/chat/completions", json=body(stream=True))
            llm.fail_before = 1
            await client.post("/v1/chat/completions", json=body())
            reply = await client.get("/metrics")
            assert reply.headers["content-type"].startswith("text/plain; version=")
            return scrape(reply.text)

    samples = asyncio.run(main())
    expected = {
        "num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.5, "prefix_cache_queries_total": 20,
        "prefix_cache_hits_total": 8, "encoder_cache_queries_total": 4, "encoder_cache_hits_total": 1, "encoder_cache_bytes": 1e3,
        "num_preemptions_total": 6, "generation_tokens_total": 70, "preprocess_decodes_total": 3,
        "preprocess_slab_hits_total": 2, "prompt_tokens_total": 15, "time_to_first_token_seconds_count": 3,
        "inter_token_latency_seconds_count": 6, "e2e_request_latency_seconds_count": 4,
    }  # fmt: skip
    assert {name: samples[(f"mmv1:{name}",)] for name in expected} == expected
    assert samples["mmv1:request_success_total", "length"] == 3
    assert samples["mmv1:request_success_total", "error"] == 1


def test_an_aborted_request_is_counted(llm: FakeLLM) -> None:
    llm.pause_before = 1

    async def main() -> None:
        async with client_of(llm) as client:
            post = asyncio.ensure_future(client.post("/v1/chat/completions", json=body()))
            while not llm.running:
                await asyncio.sleep(0)
            post.cancel()
            await asyncio.gather(post, return_exceptions=True)
            assert scrape((await client.get("/metrics")).text)["mmv1:request_success_total", "abort"] == 1

    asyncio.run(main())


def test_statistics_line_has_rates_and_is_silent_when_idle() -> None:
    statistics = StatisticsLine()
    assert statistics.next(SchedulerStats(), PreprocessStats(), 10) is None
    busy = SchedulerStats(
        num_steps=9, num_running=1, num_kv_blocks=4, num_kv_blocks_used=1, num_generation_tokens=50,
        num_prompt_tokens_computed=200, prefix_cache_queries=10, prefix_cache_hits=4,
    )  # fmt: skip
    decoded = PreprocessStats(num_decodes=3, decode_seconds=0.06)
    line = statistics.next(busy, decoded, 10)
    assert "prompt throughput: 20.0 tokens/s" in line
    assert "generation throughput: 5.0 tokens/s" in line
    assert "Running: 1 reqs, Waiting: 0 reqs" in line
    assert "KV cache usage: 25.0%" in line
    assert "Prefix cache hit rate: 40.0%" in line
    assert "Encoder cache hit rate: -" in line
    assert "3 images decoded, 20.0 ms each" in line
    busy_without_progress = SchedulerStats(num_steps=9, num_running=1)
    assert statistics.next(busy_without_progress, decoded, 10) is not None
    assert statistics.next(SchedulerStats(num_steps=9), decoded, 10) is None
