"""Everything short at once: slab, encoder cache and KV of hardly more than one largest request. Slow, and never stuck.

Slots of the slab are held by pictures that wait for room in the encoder cache, which is held by requests that wait for slots:
whoever is most urgent must get through.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mmv1 import LLM, SamplingParams
from mmv1.config import EngineArgs, resolve
from mmv1.preprocess.layout import load_layout
from tests.pictures import make_image

MAX_MODEL_LEN = 640
SIZES = [(112, 112), (280, 280), (320, 300), (300, 320), (330, 300), (200, 160)]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_waits_for_ever(tiny_model_dir: Path, seed: int) -> None:
    layout = load_layout(resolve(EngineArgs(model=str(tiny_model_dir), max_model_len=MAX_MODEL_LEN)).model)
    largest = layout.max_image_tokens(MAX_MODEL_LEN)
    rng = random.Random(seed)
    pictures = [make_image(*rng.choice(SIZES), seed=i) for i in range(24)]

    def conversation() -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for picture in rng.sample(pictures, rng.randrange(1, 5)):
            content += [{"type": "image", "image": picture}, {"type": "text", "text": "what " * rng.randrange(6)}]
        return [{"role": "user", "content": content}]

    conversations = [conversation() for _ in range(40)]
    with LLM(
        tiny_model_dir,
        max_model_len=MAX_MODEL_LEN,
        block_size=4,
        num_gpu_blocks_override=MAX_MODEL_LEN // 4 + 61,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        encoder_cache_bytes=2 * (largest + 16) * 64 * 4,
        preprocess_slab_gb=2 * layout.image_bytes(largest) / 2**30 + 1e-5,
    ) as llm:
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        stats, pixels = llm.stats(), llm.engine.preprocessor.stats()
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [8] * len(conversations)
    assert stats.num_running == stats.num_waiting == stats.num_kv_blocks_used == 0
    assert pixels.slab_pinned_bytes == pixels.num_waiting_for_slab == 0
    assert stats.num_preemptions > 0 and stats.num_images_encoded > len(pictures)  # it was short indeed
