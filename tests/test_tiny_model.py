"""The tiny model is a fair judge only if its answers depend on what it is asked and shown."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.tiny_model import SPECIAL_TOKENS, make_tiny_model
from tests.oracle import HFOracle
from tests.pictures import make_pil

FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
}


def ask(*seeds: int, text: str = "Describe the picture.", size: tuple[int, int] = (120, 90)) -> list[dict]:
    images = [{"type": "image", "image": make_pil(*size, seed)} for seed in seeds]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def test_directory_is_complete_and_the_same_every_time(tiny_model_dir: Path, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path / "again")
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert {path.name for path in tiny_model_dir.iterdir()} == FILES
    assert all((again / name).read_bytes() == (tiny_model_dir / name).read_bytes() for name in FILES)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_answers_depend_on_pictures_their_order_and_text(hf_oracle: HFOracle) -> None:
    conversations = [ask(), ask(1), ask(2), ask(1, 2), ask(2, 1), ask(1, text="How many?"), ask(1, size=(90, 120))]
    answers = [hf_oracle(conversation, 8, ignore_eos=True) for conversation in conversations]
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers)
    assert all(len(answer.token_ids) == 8 and len(set(answer.token_ids)) > 2 for answer in answers)
    assert all(int(answer.first_logits.argmax()) == answer.token_ids[0] for answer in answers)


def test_pixel_limits_bound_the_tokens_of_a_picture(hf_oracle: HFOracle) -> None:
    pad = hf_oracle.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = [hf_oracle.inputs(ask(0, size=size))["input_ids"][0].tolist().count(pad) for size in ((3, 2), (2000, 1500))]
    assert 4 <= counts[0] <= 9 and 100 <= counts[1] <= 128


def test_chat_layout_is_the_familys(hf_oracle: HFOracle) -> None:
    conversation = [*ask(0, text="Hi"), {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    assert hf_oracle.processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = hf_oracle.processor.tokenizer
    assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    text = "naïve café, 3 画像 😀\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_making_a_model_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    make_tiny_model(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
