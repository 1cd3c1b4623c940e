"""What the engine costs the host, without a model: scheduling, applying results, hashing prompts.

    python benchmarks/host_cost.py [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from pathlib import Path

from environment import describe

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.manager import KVCacheManager
from mmv1.request import Request
from mmv1.scheduler.pixels import PixelLedger
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import ModelRunnerOutput, SchedulerOutput
from mmv1.types import EngineCoreRequest, MMFeature, SamplingParams

NUM_RUNNING = 256
BLOCK_SIZE = 16


def _request(request_id: str, prompt: list[int], features: list[MMFeature] | None = None) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        mm_features=features or [],
        sampling_params=SamplingParams(),
        max_tokens=2000,
        eos_token_ids=(151645,),
    )


def _result(scheduler: Scheduler, step: SchedulerOutput) -> ModelRunnerOutput:
    requests = scheduler.requests
    ids = [i for i in step.num_scheduled_tokens if requests[i].num_computed_tokens >= requests[i].num_prompt_tokens]
    return ModelRunnerOutput(step_id=step.step_id, request_ids=ids, sampled_token_ids=[1] * len(ids))


def decode_steps(num_steps: int = 1000) -> dict[str, float]:
    """Median milliseconds to schedule, and to apply, one step of 256 running requests, one token each."""
    scheduler = Scheduler(
        KVCacheManager(60_000, BLOCK_SIZE, BlockHasher(BLOCK_SIZE)),
        EncoderCacheManager(1 << 28, bytes_per_token=7168),
        PixelLedger(100_000),
        max_num_seqs=NUM_RUNNING,
        max_num_batched_tokens=8192,
        max_num_encoder_tokens=8192,
    )
    gc.collect()
    gc.freeze()  # as the engine's process does when it is ready
    rng = random.Random(0)
    for i in range(NUM_RUNNING):
        scheduler.add_request(_request(f"{i:032x}", [rng.randrange(150_000) for _ in range(200 + i)]))
    schedule_ms, update_ms = [], []
    while len(schedule_ms) < num_steps:
        started = time.perf_counter()
        step = scheduler.schedule()
        scheduled = time.perf_counter()
        assert step is not None
        result = _result(scheduler, step)
        applying = time.perf_counter()
        scheduler.update(step, result)
        applied = time.perf_counter()
        if step.total_num_scheduled_tokens == len(step.num_scheduled_tokens) == NUM_RUNNING:
            schedule_ms.append(1e3 * (scheduled - started))
            update_ms.append(1e3 * (applied - applying))
    both = [a + b for a, b in zip(schedule_ms, update_ms, strict=True)]
    return {
        "schedule_ms": statistics.median(schedule_ms),
        "update_ms": statistics.median(update_ms),
        "schedule_and_update_ms": statistics.median(both),
        "schedule_and_update_p99_ms": sorted(both)[int(0.99 * len(both))],
    }


def prompt_hashes(num_tokens: int = 4096, repeats: int = 200) -> float:
    """Median milliseconds to hash all blocks of one prompt with two pictures in it."""
    rng = random.Random(0)
    features = [MMFeature(bytes([i]) * 32, 500 + 1500 * i, 1200, (1, 60, 80)) for i in range(2)]
    hasher = BlockHasher(BLOCK_SIZE)
    request = Request(_request("r", [rng.randrange(150_000) for _ in range(num_tokens)], features), (0,))
    times = []
    for _ in range(repeats):
        request.block_hashes = []
        started = time.perf_counter()
        hasher.extend(request, num_tokens // BLOCK_SIZE)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    figures = {**decode_steps(), "hash_4096_tokens_ms": prompt_hashes()}
    limits = {"schedule_and_update_ms": 1.0, "hash_4096_tokens_ms": 2.0}
    for name, value in figures.items():
        print(f"{name:30} {value:8.3f}" + (f"   (goal: at most {limits[name]:g})" if name in limits else ""))
    if args.json:
        args.json.write_text(json.dumps({**describe(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
