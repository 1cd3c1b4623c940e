"""The untrained model and the files around it: a complete Qwen2.5-VL directory of seven million parameters.

    token_ids = write_files(out)          # tokenizer, processor, chat template
    model = make_model(token_ids)         # transformers' own class, weights drawn from torch's seed
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_model.data import draw_example
from examples.tiny_model import PIXELS_PER_TOKEN, SPECIAL_TOKENS, write_processor_files, write_tokenizer

VOCAB_SIZE = 704  # merges for every lower-case word of the questions; what is printed in pictures is spelt by letters
MIN_PIXELS, MAX_PIXELS = 4 * PIXELS_PER_TOKEN, 256 * PIXELS_PER_TOKEN  # up to 448 x 448 as it is, larger ones scaled down


def write_files(out: Path) -> dict[str, int]:
    """Everything but config and weights. Returns the vocabulary, special tokens included."""
    out.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(out, _texts(), vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS))
    write_processor_files(out, MIN_PIXELS, MAX_PIXELS)
    return token_ids


def _texts() -> Iterator[str]:
    """The words of training conversations, without those printed in pictures."""
    for index in range(4000):
        for turn in draw_example(0, index).turns:
            yield re.sub(r"[A-Z]{2,}|[0-9]", "", f"{turn.question}\n{turn.answer}")
    yield from ("system user assistant You are a helpful assistant. JSON",) * 100


def make_model(token_ids: dict[str, int]) -> Any:
    """transformers' Qwen2_5_VLForConditionalGeneration with fresh float32 weights."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        # Rows and columns of a picture turn the lower frequencies, which at the usual 1e6 would not move over 16 tokens.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]},
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
        "tie_word_embeddings": True,
        "initializer_range": 0.03,
    }
    vision = {
        "depth": 6,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_heads": 6,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,  # pixels: 4 x 4 tokens
        "fullatt_block_indexes": [2, 5],
        "tokens_per_second": 2,
        "initializer_range": 0.03,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False,
        max_new_tokens=128,
    )
    return model
