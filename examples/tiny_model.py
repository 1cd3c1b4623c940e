"""Makes a tiny random model of a family: a complete directory of about 2 MB, with the family's own layout, tokens and files.

Its answers are noise, but they depend on every token and every pixel, so it can show that two ways to compute give the same.
Knows nothing of mmv1: transformers writes the directory, as it would write a real one.

    python examples/tiny_model.py OUT [--family qwen3_vl]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PIXELS_PER_TOKEN = 28 * 28  # a patch is 14 x 14 pixels, and 2 x 2 patches are merged into one token

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]

LLAMA_SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

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

LLAMA_CHAT_TEMPLATE = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""".strip()


def make_tiny_model(
    out: Path,
    *,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = False,
) -> Path:
    """Write the model directory `out` (made if missing) and return it.

    `family`: one of `FAMILIES`, as transformers names it. `seed` draws the weights; `min_pixels` and `max_pixels` bound what a
    picture is resized to, hence its tokens; by default 4 and 128.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sees = family in VISION_FAMILIES
    special_tokens = LLAMA_SPECIAL_TOKENS if family == "llama" else SPECIAL_TOKENS
    token_ids = write_tokenizer(out, TRAINING_TEXT, vocab_size=512, special_tokens=special_tokens)
    if sees:
        patch_size = 16 if family.startswith("qwen3") else 14
        pixels_per_token = (2 * patch_size) ** 2
        write_processor_files(
            out, min_pixels or 4 * pixels_per_token, max_pixels or 128 * pixels_per_token, patch_size=patch_size
        )
    else:
        template = LLAMA_CHAT_TEMPLATE if family == "llama" else CHAT_TEMPLATE
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")

    config = _model_config(family, token_ids, max_position_embeddings, tie_word_embeddings)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    begin, end_of_text, end_of_turn = _marks(token_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(out)
    return out


def _marks(token_ids: dict[str, int]) -> tuple[int, int, int]:
    """What begins a text, ends it, ends a turn."""
    if LLAMA_SPECIAL_TOKENS[0] in token_ids:
        return tuple(token_ids[token] for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    return token_ids["<|endoftext|>"], token_ids["<|endoftext|>"], token_ids["<|im_end|>"]


def write_tokenizer(
    out: Path, texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> dict[str, int]:
    """Train a byte-level BPE of `vocab_size` entries on `texts`, save it, and return the vocabulary, special tokens included.
    Where there is a token that begins every text, it is put before."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    begin = special_tokens[0] if special_tokens is LLAMA_SPECIAL_TOKENS else None
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast" if begin else "Qwen2Tokenizer",
        "bos_token": begin,
        "eos_token": "<|eot_id|>" if begin else "<|im_end|>",
        "pad_token": "<|end_of_text|>" if begin else "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(special_tokens[1:]),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
    })
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def write_processor_files(out: Path, min_pixels: int, max_pixels: int, *, patch_size: int = 14) -> None:
    """The image and the video processor's settings and the chat template."""
    settings = _processor_config(min_pixels, max_pixels, patch_size)
    _write_json(out / "preprocessor_config.json", settings | {"image_processor_type": "Qwen2VLImageProcessor"})
    video = "Qwen2VLVideoProcessor" if patch_size == 14 else "Qwen3VLVideoProcessor"
    _write_json(out / "video_preprocessor_config.json", settings | {"video_processor_type": video})
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _processor_config(min_pixels: int, max_pixels: int, patch_size: int) -> dict[str, Any]:
    """What the image and the video processor share, in the words of the published directories."""
    is_older = patch_size == 14
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return {
        "processor_class": "Qwen2_5_VLProcessor" if is_older else "Qwen3VLProcessor",
        **(limits if is_older else {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}),
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if is_older else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if is_older else [0.5, 0.5, 0.5],
    }


_EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_LONGER = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_SECTIONED = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_INTERLEAVED = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
# What the text part of a family says beside `_model_config`.
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"rope_parameters": _SECTIONED},
    "qwen2_5_vl": {"rope_parameters": _SECTIONED},
    "qwen3_vl": {"rope_parameters": _INTERLEAVED, "head_dim": 16},
    "qwen3_vl_moe": {"rope_parameters": _INTERLEAVED, "head_dim": 16, **_EXPERTS},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 32},
    "qwen3_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 32, "norm_topk_prob": True,
        **_EXPERTS, "mlp_only_layers": [1],
    },
    "llama": {"rope_parameters": _LONGER},
}  # fmt: skip
_TOWER = {"depth": 4, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
_STRETCHED = _TOWER | {
    "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": _TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    "qwen2_5_vl": _TOWER | {
        "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 14, "tokens_per_second": 2,
        "window_size": 112,  # pixels: 4 x 4 tokens
        "fullatt_block_indexes": [1, 3],
    },
    "qwen3_vl": _STRETCHED,
    "qwen3_vl_moe": _STRETCHED,
}  # fmt: skip
FAMILIES = tuple(_TEXT)
VISION_FAMILIES = tuple(_VISION)


def _model_config(
    family: str, token_ids: dict[str, int], max_position_embeddings: int, tie_word_embeddings: bool
) -> Any:
    from transformers import CONFIG_MAPPING

    begin, end_of_text, end_of_turn = _marks(token_ids)
    text = {
        "vocab_size": -(-len(token_ids) // 64) * 64,  # rounded up past the tokenizer's, as in the real ones
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "bos_token_id": begin,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
        "tie_word_embeddings": tie_word_embeddings,
        **_TEXT[family],
    }
    if family not in _VISION:
        return CONFIG_MAPPING[family](**text)
    return CONFIG_MAPPING[family](
        text_config=text,
        vision_config=_VISION[family],
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
    parser = argparse.ArgumentParser(description="Write the directory of a tiny random model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.out, family=arguments.family, seed=arguments.seed))
