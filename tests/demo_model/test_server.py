"""The demo model behind the server, under every pressure at once: each answer is still the one transformers gives."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo_model.data import Example, held_out_questions
from demo_model.evaluate import MAX_TOKENS, MODEL_DIR, answer_with_transformers
from mmv1.config import EngineArgs, resolve
from mmv1.preprocess.layout import load_layout
from tests.integration.server import Server, serving

NUM_QUESTIONS = 200
MAX_MODEL_LEN = 576  # hardly more than the longest question
PRESSURE = {
    "--max-model-len": MAX_MODEL_LEN,
    "--max-num-batched-tokens": 96,
    "--max-num-seqs": 16,
    "--block-size": 4,
    "--num-gpu-blocks-override": MAX_MODEL_LEN // 4 + 2,
}


def as_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pictures as data: URLs."""
    converted = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                kind = "png" if part["image"].startswith(b"\x89PNG") else "jpeg"
                url = f"data:image/{kind};base64," + base64.b64encode(part["image"]).decode()
                part = {"type": "image_url", "image_url": {"url": url}}
            content.append(part)
        converted.append({"role": message["role"], "content": content})
    return converted


def questions_of(example: Example) -> list[dict[str, Any]]:
    return as_openai(example.messages([scene.encoded() for scene in example.scenes]))  # type: ignore[arg-type]


async def ask_all(server: Server, conversations: list[list[dict[str, Any]]]) -> list[str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

        async def ask(messages: list[dict[str, Any]]) -> str:
            body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        return await asyncio.gather(*(ask(messages) for messages in conversations))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_are_transformers_under_pressure(tmp_path: Path) -> None:
    examples = held_out_questions(NUM_QUESTIONS, seed=5)
    layout = load_layout(resolve(EngineArgs(max_model_len=MAX_MODEL_LEN)).model)
    largest = layout.max_image_tokens(MAX_MODEL_LEN)
    hidden_size = 256
    options = PRESSURE | {
        "--encoder-cache-bytes": 3 * (largest + 16) * hidden_size * 4,
        "--preprocess-slab-gb": f"{(4 * layout.image_bytes(largest) + 65536) / 2**30:.9f}",
    }
    expected = answer_with_transformers(MODEL_DIR)(examples)
    conversations = [questions_of(example) for example in examples]
    with serving(MODEL_DIR, tmp_path, *(str(word) for pair in options.items() for word in pair)) as server:
        answers = asyncio.run(ask_all(server, conversations))
        assert answers == expected
        for _ in range(5):  # which of them happen when is a matter of timing
            # Some still have their prefix, some only their embeddings.
            assert asyncio.run(ask_all(server, conversations[-40:])) == expected[-40:]
            metrics = server.metrics()
            if metrics["num_preemptions_total"] and metrics["encoder_cache_hits_total"]:
                break
    num_pictures = sum(len(example.scenes) for example in examples)
    assert metrics["num_preemptions_total"] > 0
    assert metrics["prefix_cache_hits_total"] > 16 * NUM_QUESTIONS  # more than the common beginning
    assert metrics["encoder_cache_hits_total"] > 0
    assert metrics["images_encoded_total"] > num_pictures  # evicted and made again
    right = sum(answer == example.turns[-1].answer for answer, example in zip(answers, examples, strict=True))
    assert right >= 0.97 * NUM_QUESTIONS
