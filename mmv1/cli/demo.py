"""`mmv1 demo`: two pictures, four questions, and the engine's own account of what it did not do twice.

With a Redis in the environment's REDIS_URL, processed pictures are kept there: run it again, and nothing is decoded at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mmv1.cli.event_loop import run_until_signal
from mmv1.config import EngineConfig, resolve
from mmv1.errors import ConfigError, EngineError
from mmv1.log import configure_logging
from mmv1.types import SamplingParams

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM

QUESTIONS = [
    ("shapes.jpg", "Describe this image."),
    ("word.jpg", "Describe this image."),
    ("shapes.jpg", "What color is the star?"),
    ("word.jpg", "Which word is shown?"),
]
_MAX_MODEL_LEN = 2048  # no question is longer; a large model's own length would need a large KV cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "With a Redis (--redis-url or REDIS_URL) processed pictures are kept there: the next time, none is decoded."


def run(namespace: argparse.Namespace) -> int:
    os.environ.setdefault("MMV1_LOG_LEVEL", "WARNING")  # of the engine's processes too
    configure_logging("demo")
    args = namespace.engine_args
    config = resolve(dataclasses.replace(args, max_model_len=args.max_model_len or _MAX_MODEL_LEN))
    return run_until_signal(_demonstrate(config, pictures_dir()))


def pictures_dir() -> Path:
    """In an installed package, or in the repository beside it. Raises ConfigError."""
    package = Path(__file__).parent.parent
    for path in (package / "demo_pictures", package.parent / "examples" / "pictures"):
        if path.is_dir():
            return path
    raise ConfigError("the demo's pictures are not installed: install mmv1 anew")


async def _demonstrate(config: EngineConfig, pictures: Path) -> int:
    from mmv1.engine.async_llm import AsyncLLM

    engine = AsyncLLM(config)
    started = time.perf_counter()
    ready = await engine.start()
    print(
        f"Engine ready in {time.perf_counter() - started:.1f} s on {ready.device}, {ready.dtype}: {ready.num_kv_blocks} "
        f"KV blocks of {ready.block_size} tokens, {ready.encoder_cache_bytes >> 20} MiB for picture embeddings"
    )
    try:
        for name, question in QUESTIONS:
            await _ask(engine, pictures / name, question)
        _sum_up(engine)
    finally:
        await engine.close()
    return 0


async def _ask(engine: AsyncLLM, picture: Path, question: str) -> None:
    """Print the answer as it comes, and what answering took."""
    from mmv1.preprocess.prompt import ImagePart, Message, TextPart

    before, pictures_before = await engine.refresh_stats(), engine.preprocessor.stats()
    print(f"\n{picture.name}: {question}\n  > ", end="", flush=True)
    started = time.perf_counter()
    first_s = 0.0
    cached = prompt = 0
    messages = [Message("user", [ImagePart(picture), TextPart(question)])]
    async for delta in engine.generate(messages, SamplingParams(temperature=0.0, max_tokens=64)):
        first_s = first_s or time.perf_counter() - started
        cached, prompt = max(cached, delta.num_cached_tokens), delta.num_prompt_tokens
        print("".join(output.text for output in delta.outputs), end="", flush=True)
    after, pictures = await engine.refresh_stats(), engine.preprocessor.stats()
    from_redis = f", from Redis: {pictures.num_store_hits - pictures_before.num_store_hits}" if pictures.store_is_up else ""
    print(
        f"\n  first token after {1e3 * first_s:.0f} ms | pictures decoded and preprocessed: "
        f"{pictures.num_decodes - pictures_before.num_decodes}{from_redis}, "
        f"encoded: {after.num_images_encoded - before.num_images_encoded} | "
        f"prompt tokens from the prefix cache: {cached} of {prompt}"
    )


def _sum_up(engine: AsyncLLM) -> None:
    """Raises EngineError when a picture was worked on twice, or nothing came from the prefix cache."""
    stats, pictures = engine.stats(), engine.preprocessor.stats()
    from_redis = f"{pictures.num_store_hits} came processed from Redis, " if pictures.num_store_hits else ""
    print(
        f"\nIn all: {len(QUESTIONS)} questions, {pictures.num_decodes} pictures decoded and preprocessed, {from_redis}"
        f"{stats.num_images_encoded} encoded; "
        f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} prompt tokens came from the prefix cache."
    )
    if not pictures.num_decodes + pictures.num_store_hits == stats.num_images_encoded == 2 or not stats.prefix_cache_hits:
        raise EngineError("a picture was worked on twice, or no prefix found again: that is not what should have happened")
    print("The later questions were about pictures already seen: nothing of them was decoded, preprocessed or encoded again.")
