"""Random Qwen2.5-VL models of real shapes: as wide and as deep as the published ones, in bfloat16."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from examples.tiny_model import PIXELS_PER_TOKEN, TRAINING_TEXT, write_processor_files, write_tokenizer

DEVICE = torch.device("cuda")
# Weights are drawn so that a matrix multiplies the size of what passes through it by this. Below 1 a picture moves the answer
# little; from 1.4 on a random model is chaotic, and rounding moves it as much as a picture does.
GAIN = 1.1
MAX_PICTURE_TOKENS = 1280


@dataclass(frozen=True)
class Shape:
    """A language model and the vision tower of Qwen2.5-VL. `vision_layers` and those below are of the published tower."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    vision_layers: int = 32
    vision_hidden_size: int = 1280
    vision_intermediate_size: int = 3420
    vision_heads: int = 16


SHAPES = {
    "3B": Shape(36, 2048, 11008, 16, 2, 151936, True),
    "7B, 8 layers": Shape(8, 3584, 18944, 28, 4, 152064, False),
}


def find_or_make(shape: Shape, folder: Path) -> Path:
    """The model's directory in `folder`, made if it is not there."""
    key = f"{shape} {GAIN} {version('torch')} {version('transformers')} {Path(__file__).read_text()}"
    path = folder / f"random-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder, prefix="unfinished-"))
        try:
            make_random_model(shape, unfinished)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


def make_random_model(shape: Shape, out: Path, seed: int = 0) -> None:
    """Write a complete model directory; the same for the same seed on the same kind of device."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    token_ids = write_tokenizer(out, TRAINING_TEXT, vocab_size=512)
    write_processor_files(out, 4 * PIXELS_PER_TOKEN, MAX_PICTURE_TOKENS * PIXELS_PER_TOKEN)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(), DEVICE:
            model = Qwen2_5_VLForConditionalGeneration(_config(shape, token_ids))
    finally:
        torch.set_default_dtype(default)
    _draw_weights(model, torch.Generator(DEVICE).manual_seed(seed))
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(out)


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.normal_(0.0, GAIN / math.sqrt(parameter[0].numel()), generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.2, generator=generator)
        else:
            parameter.normal_(1.0, 0.1, generator=generator)


def _config(shape: Shape, token_ids: dict[str, int]) -> object:
    from transformers import Qwen2_5_VLConfig

    numbers = asdict(shape)
    text = {name: numbers[name] for name in ("hidden_size", "intermediate_size", "vocab_size")} | {
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "tie_word_embeddings": shape.tied,
    }
    every_fourth = shape.vision_layers // 4
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden_size,
        "intermediate_size": shape.vision_intermediate_size,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden_size,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [every_fourth * (quarter + 1) - 1 for quarter in range(4)],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
    )
