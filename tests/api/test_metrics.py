"""/metrics: the counters of engine and preprocessor as they are, and what clients feel; and its page in docs/."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from mmv1.preprocess.pictures import PreprocessStats
from mmv1.preprocess.timings import STAGES
from mmv1.types import SchedulerStats
from tests.api.fake_embedder import FakeEmbedder
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


def scrape_once(llm: FakeLLM, embedder: FakeEmbedder | None = None) -> str:
    """/metrics, after one answer: a counter with a label of its own is there from its first count on."""
    async def main() -> str:
        async with client_of(llm, embedder) as client:
            await client.post("/v1/chat/completions", json=body())
            return (await client.get("/metrics")).text

    return asyncio.run(main())


def test_stages_are_one_family_of_histograms(llm: FakeLLM) -> None:
    for seconds in (0.0004, 0.001, 0.003, 100.0):
        llm.preprocessor.timings.observe("decode", seconds)
    samples = scrape(scrape_once(llm))
    name = "mmv1:preprocess_seconds"
    below = {"0.0005": 1, "0.001": 2, "0.002": 2, "0.004": 3, "8.192": 3, "+Inf": 4}
    assert {bound: samples[f"{name}_bucket", bound, "decode"] for bound in below} == below
    assert samples[f"{name}_count", "decode"] == 4
    assert samples[f"{name}_sum", "decode"] == 100.0044
    assert [samples[f"{name}_count", stage] for stage in STAGES if stage != "decode"] == [0] * (len(STAGES) - 1)


def test_levels_and_the_shared_store(llm: FakeLLM) -> None:
    llm.preprocess_stats = PreprocessStats(
        num_slab_hits=1, num_decodes=2, num_store_hits=3, num_store_misses=4, num_store_failures=5, num_store_saves=6,
        num_store_saves_skipped=7, num_lease_waits=8, store_is_up=True,
    )  # fmt: skip
    expected = {
        "slab_hits_total": 1, "decodes_total": 2, "store_hits_total": 3, "store_misses_total": 4, "store_failures_total": 5,
        "store_saves_total": 6, "store_saves_skipped_total": 7, "lease_waits_total": 8, "store_up": 1,
    }  # fmt: skip
    samples = scrape(scrape_once(llm))
    assert {name: samples[(f"mmv1:preprocess_{name}",)] for name in expected} == expected
    llm.preprocess_stats = PreprocessStats()
    assert scrape(scrape_once(llm))[("mmv1:preprocess_store_up",)] == 0


def test_the_page_about_metrics_has_each_of_them(llm: FakeLLM) -> None:
    """Its name, type and label; the library adds, unasked, when each of its own began to count."""
    served = {}
    for family in text_string_to_metric_families(scrape_once(llm, FakeEmbedder())):
        if family.name.endswith("_created"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}
        name = family.name + "_total" if family.type == "counter" else family.name
        served[name] = (family.type, ", ".join(sorted(labels)))
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(mmv1:\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| .+ \|$", page, re.MULTILINE)
    assert {name: (kind, label) for name, kind, label in rows} == served
    assert len(rows) == len(served)
