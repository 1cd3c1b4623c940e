"""`make demo`: two pictures, four questions, and the engine's own account of what it did not do twice.

    python examples/demo.py [MODEL]

Without MODEL it is the small model that mmv1 brings along, which knows shapes, words and digits. With a Redis in the
environment's REDIS_URL, processed pictures are kept there: run it again, and nothing is decoded at all.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from mmv1 import SamplingParams
from mmv1.config import EngineArgs, resolve
from mmv1.engine.async_llm import AsyncLLM
from mmv1.preprocess.prompt import ImagePart, Message, TextPart

PICTURES = Path(__file__).parent / "pictures"
QUESTIONS = [
    ("shapes.jpg", "Describe this image."),
    ("word.jpg", "Describe this image."),
    ("shapes.jpg", "What color is the star?"),
    ("word.jpg", "Which word is shown?"),
]


async def ask(engine: AsyncLLM, picture: Path, question: str) -> None:
    """Print the answer as it comes, and what answering took."""
    before, pictures_before = await engine.refresh_stats(), engine.preprocessor.stats()
    print(f"\n{picture.name}: {question}\n  > ", end="", flush=True)
    started = time.perf_counter()
    first_s = 0.0
    cached = prompt = 0
    messages = [Message("user", [ImagePart(picture.read_bytes()), TextPart(question)])]
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


async def main(model: str) -> None:
    engine = AsyncLLM(resolve(EngineArgs(model=model, max_model_len=2048)))
    started = time.perf_counter()
    ready = await engine.start()
    print(
        f"Engine ready in {time.perf_counter() - started:.1f} s on {ready.device}, {ready.dtype}: {ready.num_kv_blocks} "
        f"KV blocks of {ready.block_size} tokens, {ready.encoder_cache_bytes >> 20} MiB for picture embeddings"
    )
    try:
        for name, question in QUESTIONS:
            await ask(engine, PICTURES / name, question)
        stats, pictures = engine.stats(), engine.preprocessor.stats()
        from_redis = f"{pictures.num_store_hits} came processed from Redis, " if pictures.num_store_hits else ""
        print(
            f"\nIn all: {len(QUESTIONS)} questions, {pictures.num_decodes} pictures decoded and preprocessed, {from_redis}"
            f"{stats.num_images_encoded} encoded; "
            f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} prompt tokens came from the prefix cache.\n"
            "The later questions were about pictures already seen: nothing of them was decoded, preprocessed or encoded again."
        )
        once_each = pictures.num_decodes + pictures.num_store_hits == stats.num_images_encoded == 2
        if not once_each or not stats.prefix_cache_hits:
            sys.exit("That is not what should have happened.")
    finally:
        await engine.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ""))
