"""Makes a tiny random Qwen2.5-VL: a complete model directory of about 2 MB, with the family's own layout, tokens and files.

Its answers are noise, but they depend on every token and every pixel, so it can show that two ways to compute give the same.
Knows nothing of mmv1: transformers writes the directory, as it would write a real one.

    python examples/tiny_model.py OUT
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PIXELS_PER_TOKEN = 28 * 28  # a patch is 14 x 14 pixels, and 2 x 2 patches are merged into one token

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]

# How every Qwen2 tokenizer cuts text into words: contractions, letters, single digits, punctuation, white space.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TRAINING_TEXT = [
    "What is in this picture? Describe the picture in one sentence. Which colours do you see, and where?",
    "How many shapes are there? Read the text in the image. Is the circle left of the square, or right of it?",
    "The first image shows a yellow sun above green hills; the second image shows a red boat on a blue sea.",
    "Compare these two pictures, please: what is the same, and what has changed between them?",
    "You are a helpful assistant. system user assistant Answer shortly and say when you are not sure.",
    "Il était une fois un café. Das Bild zeigt ein Haus. 图片里有什么? この画像は何ですか? Что на картинке?",
    '{"caption": "a small house", "objects": ["door", "window"], "score": 0.75}',
]

CHAT_TEMPLATE = r"""
{%- if not messages or messages[0].role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()


def make_tiny_model(
    out: Path,
    *,
    seed: int = 0,
    min_pixels: int = 4 * PIXELS_PER_TOKEN,
    max_pixels: int = 128 * PIXELS_PER_TOKEN,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = False,
) -> Path:
    """Write the model directory `out` (made if missing) and return it.

    `seed` draws the weights; `min_pixels` and `max_pixels` bound what a picture is resized to, hence its tokens
    (`PIXELS_PER_TOKEN` pixels each).
    """
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(out, TRAINING_TEXT, vocab_size=512)
    write_processor_files(out, min_pixels, max_pixels)

    config = _model_config(token_ids, max_position_embeddings, tie_word_embeddings)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        model = Qwen2_5_VLForConditionalGeneration(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(out)
    return out


def write_tokenizer(out: Path, texts: Iterable[str], *, vocab_size: int) -> dict[str, int]:
    """Train a byte-level BPE of `vocab_size` entries on `texts`, save it, and return the vocabulary, special tokens included."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
    })
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def write_processor_files(out: Path, min_pixels: int, max_pixels: int) -> None:
    """The image and the video processor's settings and the chat template."""
    _write_json(out / "preprocessor_config.json", _processor_config(min_pixels, max_pixels) | {
        "image_processor_type": "Qwen2VLImageProcessor",
    })
    _write_json(out / "video_preprocessor_config.json", _processor_config(min_pixels, max_pixels) | {
        "video_processor_type": "Qwen2VLVideoProcessor",
    })
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _processor_config(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """What the image and the video processor share, in the words of the published directories."""
    return {
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _model_config(token_ids: dict[str, int], max_position_embeddings: int, tie_word_embeddings: bool) -> Any:
    from transformers import Qwen2_5_VLConfig

    end_of_text = token_ids["<|endoftext|>"]
    text = {
        "vocab_size": -(-len(token_ids) // 64) * 64,  # rounded up past the tokenizer's, as in the real ones
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": end_of_text,
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": end_of_text,
        "tie_word_embeddings": tie_word_embeddings,
    }
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,  # pixels: 4 x 4 tokens
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )


def _draw_weights(model: Any, generator: Any) -> None:
    """Replace every weight: matrices and biases by N(0, 0.2), norms by N(1, 0.1).

    Far wider than a real initialisation: with that one a random model repeats one token, whatever it sees.
    """
    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
            else:
                parameter.normal_(1.0, 0.1, generator=generator)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny random Qwen2.5-VL model directory.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.out, seed=arguments.seed))
