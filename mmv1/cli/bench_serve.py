"""`mmv1 bench serve`: the load that the flags describe, on a running server, and what came of it."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmv1.cli.bench_pictures import Pictures
from mmv1.cli.figures import details_of, figures_of, lines_of
from mmv1.cli.floors import Device, LanguageModel, Request, VisionTower, floor_of, read_model
from mmv1.cli.load import LoadClient, Sample, arrival_gaps_s
from mmv1.cli.workload import WARMUP, WORKLOADS, PictureSize, Prompt, RandomLoad, random_words
from mmv1.errors import ConfigError

_DEFAULT_SIZE = PictureSize(1024, 1024)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Everything that is sent, made before the clock starts. `num_prefix_tokens`: shared by all counted prompts."""

    warmups: Sequence[Prompt]
    prompts: Sequence[Prompt]
    gaps_s: Sequence[float]
    max_concurrency: int | None
    num_prefix_tokens: int = 0


def named_load(
    name: str, seed: int, *, num_prompts: int | None = None, max_concurrency: int | None = None,
    num_warmups: int | None = None, output_len: int | None = None,
) -> Load:  # fmt: skip
    """A workload as it is, but for what is given; all requests at once, as far as its concurrency goes."""
    workload = WORKLOADS[name]
    if output_len is not None:
        workload = replace(workload, output_len=output_len)
    rng, pictures = np.random.default_rng(seed), Pictures(seed)
    count = num_prompts or workload.num_prompts
    return Load(
        warmups=WARMUP.prompts(rng, pictures, WARMUP.num_prompts if num_warmups is None else num_warmups),
        prompts=workload.prompts(rng, pictures, count),
        gaps_s=[0.0] * count,
        max_concurrency=max_concurrency or workload.max_concurrency,
    )


def random_load(namespace: argparse.Namespace, tokens_per_word: float) -> Load:
    """Raises ConfigError for flags that contradict each other."""
    num_images = namespace.num_images
    if num_images is None:
        num_images = 1 if namespace.dataset_name == "random-mm" else 0
    elif num_images and namespace.dataset_name == "random":
        raise ConfigError("--dataset-name random has no pictures: random-mm has")
    if namespace.image_size and namespace.random_mm_bucket_config:
        raise ConfigError("--image-size and --random-mm-bucket-config say the same thing: give one of them")
    sizes = namespace.random_mm_bucket_config or {namespace.image_size or _DEFAULT_SIZE: 1.0}
    random = RandomLoad(
        num_words=max(1, round(namespace.random_input_len / tokens_per_word)),
        num_prefix_words=round(namespace.random_prefix_len / tokens_per_word),
        output_len=namespace.random_output_len or 128,
        range_ratio=namespace.random_range_ratio,
        num_images=num_images,
        sizes=list(sizes.items()),
    )
    rng = np.random.default_rng(namespace.seed)
    prompts = random.prompts(rng, Pictures(namespace.seed, pool_size=namespace.mm_pool_size, reuse=namespace.mm_reuse))
    warmups = list(islice(prompts, namespace.num_warmups or 0))
    counted = list(islice(prompts, namespace.num_prompts or 100))
    return Load(
        warmups=warmups,
        prompts=counted,
        gaps_s=arrival_gaps_s(rng, len(counted), namespace.request_rate, namespace.burstiness),
        max_concurrency=namespace.max_concurrency,
        num_prefix_tokens=round(random.num_prefix_words * tokens_per_word),
    )


async def warm_up(client: LoadClient, model: str, load: Load) -> None:
    limit = load.max_concurrency or WARMUP.max_concurrency
    await client.send_all(model, load.warmups, gaps_s=[0.0] * len(load.warmups), max_concurrency=limit)


async def measure(client: LoadClient, model: str, load: Load) -> tuple[list[Sample], float]:
    """The samples, in the order of the prompts, and how many seconds they took together."""
    started = time.perf_counter()
    with tqdm(total=len(load.prompts), unit="req", disable=not sys.stderr.isatty()) as bar:
        samples = await client.send_all(
            model, load.prompts, gaps_s=load.gaps_s, max_concurrency=load.max_concurrency, on_done=bar.update
        )
    return samples, time.perf_counter() - started


def floor_rps(
    formulas: tuple[LanguageModel, VisionTower], load: Load, samples: Sequence[Sample], device: Device
) -> float | None:
    """Requests/s of the floor for what was asked and answered; None when nothing was. Requests with the same pictures in the same
    order share them, as prompts put pictures first; pictures shared otherwise are counted as new."""
    model, tower = formulas
    answered = [(prompt, sample) for prompt, sample in zip(load.prompts, samples, strict=True) if not sample.error]
    if not answered:
        return None
    picture_tokens = sum(tower.grid(*size)[1] for prompt, _ in answered for size in prompt.sizes)
    input_tokens, output_tokens = (
        sum(getattr(sample, field) for _, sample in answered) for field in ("num_prompt_tokens", "num_output_tokens")
    )
    text_tokens = max(1.0, (input_tokens - picture_tokens) / len(answered) - load.num_prefix_tokens)
    distinct = len({tuple(prompt.pictures) for prompt, _ in answered})
    batch = min(len(answered), load.max_concurrency or len(answered))
    seconds = 0.0
    for sizes, number in Counter(tuple(prompt.sizes) for prompt, _ in answered).items():
        request = Request(
            images=sizes,
            text_tokens=text_tokens,
            output_tokens=output_tokens / len(answered),
            reuse=len(answered) / distinct if sizes else 1,
            shared_prefix=load.num_prefix_tokens,
        )
        floor = floor_of(model, tower, request, device=device, max_batch=batch)
        seconds += number / (floor.serial_rps if batch == 1 else floor.ideal_rps)
    return len(answered) / seconds


async def bench_serve(namespace: argparse.Namespace) -> int:
    base_url = (namespace.base_url or f"http://{namespace.host}:{namespace.port}").rstrip("/").removesuffix("/v1")
    ignore_eos = namespace.ignore_eos or namespace.workload is not None
    async with LoadClient(base_url, ignore_eos=ignore_eos, endpoint=namespace.endpoint) as client:
        first = await client.first_model()
        model = namespace.model or first.id
        formulas = _formulas(namespace.model_dir, first.root)
        words = np.random.default_rng(namespace.seed)
        tokens_per_word = await client.tokens_per_word(model, lambda count: random_words(words, count))
        load = _load_of(namespace, tokens_per_word)
        await warm_up(client, model, load)
        if namespace.profile:
            await client.post("/start_profile")
        samples, duration_s = await measure(client, model, load)
        if namespace.profile:
            await client.post("/stop_profile")
    figures = figures_of(
        samples,
        duration_s,
        metrics=namespace.percentile_metrics,
        percentiles=namespace.metric_percentiles,
        goodput_ms=dict(namespace.goodput or ()),
    )
    result = {**described(namespace, model, load), **figures}
    device = replace(Device(), flops=namespace.device_tflops * 1e12, bandwidth=namespace.device_tbps * 1e12)
    if formulas is not None and (rps := floor_rps(formulas, load, samples, device)):
        result |= {"floor_request_throughput": rps, "achieved_of_floor": result["request_throughput"] / rps}
        result |= {"floor_device_tflops": namespace.device_tflops, "floor_device_tbps": namespace.device_tbps}
    print("\n".join(lines_of(result)))
    if result["errors"]:
        print(f"mmv1: {result['failed']} requests failed; one of the errors: {result['errors'][0]}", file=sys.stderr)
    if namespace.save_result or namespace.save_detailed:
        save(namespace, result | (details_of(samples) if namespace.save_detailed else {}), file_name(result))
    return 0 if result["completed"] else 1


def _load_of(namespace: argparse.Namespace, tokens_per_word: float) -> Load:
    """Raises ConfigError."""
    if namespace.workload is None:
        return random_load(namespace, tokens_per_word)
    if namespace.dataset_name is not None:
        raise ConfigError("--workload and --dataset-name are two kinds of prompts: give one of them")
    load = named_load(
        namespace.workload,
        namespace.seed,
        num_prompts=namespace.num_prompts,
        max_concurrency=namespace.max_concurrency,
        num_warmups=namespace.num_warmups,
        output_len=namespace.random_output_len,
    )
    rng = np.random.default_rng([namespace.seed, 1])
    return replace(load, gaps_s=arrival_gaps_s(rng, len(load.prompts), namespace.request_rate, namespace.burstiness))


def _formulas(model_dir: str | None, root: str) -> tuple[LanguageModel, VisionTower] | None:
    """Those of the directory the user named, which must be known; else of the server's, if it is one that is here and known."""
    if model_dir is not None:
        if not (Path(model_dir) / "config.json").is_file():
            raise ConfigError(f"--model-dir {model_dir} has no config.json")
        return read_model(Path(model_dir))
    if not root or not (Path(root) / "config.json").is_file():
        return None
    try:
        return read_model(Path(root))
    except ConfigError as error:
        print(f"mmv1: no floor is given: {error}", file=sys.stderr)
        return None


def described(namespace: argparse.Namespace, model: str, load: Load) -> dict[str, Any]:
    """What was asked for. An infinite rate is the text "inf", as in vLLM's files: JSON has no such number."""
    asked: dict[str, Any] = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat",
        "endpoint_type": "openai-chat",
        "model_id": model,
        "workload": namespace.workload,
        "num_prompts": len(load.prompts),
        "request_rate": namespace.request_rate if math.isfinite(namespace.request_rate) else "inf",
        "burstiness": namespace.burstiness,
        "max_concurrency": load.max_concurrency,
        "ignore_eos": namespace.ignore_eos or namespace.workload is not None,
        "seed": namespace.seed,
    }
    if namespace.workload is None:
        names = ("random_input_len", "random_prefix_len", "random_range_ratio", "mm_pool_size", "mm_reuse")
        asked |= {name: getattr(namespace, name) for name in names}
        asked["random_output_len"] = namespace.random_output_len or 128
        asked["num_images"] = len(load.prompts[0].sizes)
        asked["image_sizes"] = sorted({f"{size.width}x{size.height}" for prompt in load.prompts for size in prompt.sizes})
    return asked


def file_name(result: dict[str, Any]) -> str:
    """vLLM's, with the workload's name first."""
    concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] else ""
    workload = f"{result['workload']}-" if result["workload"] else ""
    return f"{workload}{result['request_rate']}qps{concurrency}-{result['model_id'].split('/')[-1]}-{result['date']}.json"


def save(namespace: argparse.Namespace, result: dict[str, Any], made_name: str) -> None:
    """Raises ConfigError."""
    path = Path(namespace.result_dir) / (namespace.result_filename or made_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the result cannot be written to {path}: {error.strerror}") from error
    print(f"Written to {path}", file=sys.stderr)
