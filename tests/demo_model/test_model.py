"""The shipped model: complete, small, and right about pictures it has never seen, through mmv1 as through transformers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

from demo_model.data import Example, draw_example, draw_question, held_out_questions
from demo_model.evaluate import BATCH, MAX_TOKENS, MODEL_DIR, Answer, answer_with_transformers, swapped_pairs
from demo_model.model import write_files
from demo_model.packing import Encoder, Sizes, packs
from demo_model.scene import Scene
from demo_model.train import answer_logits, use_packed_attention
from examples.tiny_model import SPECIAL_TOKENS
from mmv1 import LLM, SamplingParams

FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json", "training_log.json",
    "evaluation_mmv1.json", "evaluation_transformers.json",
}
SMALL = Sizes(patches=2048, tokens=2048, windows=256, pictures=64, texts=64, answers=1024)


@pytest.fixture(scope="module")
def ask() -> Iterator[Answer]:
    """Answers all of a list of examples through one engine."""
    with LLM(MODEL_DIR, dtype="float32", max_model_len=2048) as engine:
        def answer(examples: list[Example]) -> list[str]:
            conversations = [example.messages([scene.encoded() for scene in example.scenes]) for example in examples]
            outputs = engine.chat(conversations, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
            return [output.outputs[0].text for output in outputs]

        yield answer


def test_the_directory_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 15_000_000


def test_five_to_seven_million_bf16_parameters() -> None:
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 (not a dict)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 5_000_000 <= sum(tensor.numel() for tensor in tensors) <= 7_000_000


def test_the_tower_has_both_kinds_of_layers() -> None:
    vision = json.loads((MODEL_DIR / "config.json").read_text())["vision_config"]
    assert 0 < len(vision["fullatt_block_indexes"]) < vision["depth"]


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    token_ids = write_files(tmp_path)
    assert set(SPECIAL_TOKENS) <= set(token_ids)
    for written in tmp_path.iterdir():
        assert written.read_bytes() == (MODEL_DIR / written.name).read_bytes(), written.name


def test_printed_words_are_spelt_letter_by_letter() -> None:
    tokens = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).encode("the word HAMMER").tokens
    assert tokens[-6:] == list("HAMMER") or tokens[-6:] == ["ĠH", *"AMMER"]


@pytest.mark.parametrize("backend", ["mmv1", "transformers"])
def test_the_kept_log_meets_the_targets(backend: str) -> None:
    log = json.loads((MODEL_DIR / f"evaluation_{backend}.json").read_text())
    exact = dict(log["exact_percent"])
    assert log["questions"] == 2000
    assert exact["all"] >= 97
    assert exact["caption"] >= 95
    assert min(exact.values()) >= 93
    assert log["swapped_percent"] >= 95
    other = json.loads((MODEL_DIR / "evaluation_mmv1.json").read_text())["exact_percent"]["all"]
    assert abs(exact["all"] - other) <= 0.3


@pytest.mark.slow
def test_held_out_questions_are_answered_as_transformers_does_and_rightly(ask: Answer) -> None:
    questions = held_out_questions(3 * BATCH, seed=5)
    answers = ask(questions)
    assert answers == answer_with_transformers(MODEL_DIR)(questions)
    right = sum(given == example.turns[-1].answer for example, given in zip(questions, answers, strict=True))
    assert right >= 0.93 * len(questions)


def test_swapped_pictures_swap_the_answers(ask: Answer) -> None:
    pairs = swapped_pairs(10)
    before = ask([example for pair in pairs for example in pair])
    after = ask([replace(one, scenes=other.scenes) for pair in pairs for one, other in (pair, pair[::-1])])
    held = sum(before[at:at + 2] == after[at:at + 2][::-1] for at in range(0, len(before), 2))
    assert all(before[at] != before[at + 1] for at in range(0, len(before), 2))
    assert held >= 9


def test_the_order_of_pictures_matters(ask: Answer) -> None:
    opposite = {"the first": "the second", "the second": "the first"}
    compared = (draw_question(6, index, "compare") for index in count())
    examples: list[Example] = []
    while len(examples) < 10:
        example = next(compared)
        if len(example.scenes) == 2 and example.turns[-1].answer in opposite:
            examples.append(example)
    answers = ask(examples + [replace(example, scenes=example.scenes[::-1]) for example in examples])
    turned = sum(opposite.get(one) == other for one, other in zip(answers[:10], answers[10:], strict=True))
    assert turned >= 9


def test_training_sees_what_serving_sees() -> None:
    """Packed training input and its shorter way through the model give the logits that transformers' own way gives."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    processor, encoder = AutoProcessor.from_pretrained(MODEL_DIR), Encoder(MODEL_DIR)
    examples = [draw_example(9, index) for index in range(60)]
    examples = [example for example in examples if all(max(scene.width, scene.height) < 200 for scene in example.scenes)][:6]
    encoded = [encoder.encode(example, last_turn_only=True) for example in examples]
    expected = []
    for example, one in zip(examples, encoded, strict=True):
        pictures = [_picture(scene) for scene in example.scenes]
        answer = {"role": "assistant", "content": [{"type": "text", "text": example.turns[-1].answer}]}
        inputs = processor.apply_chat_template(
            [*example.messages(pictures), answer], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == one.tokens.tolist()
        with torch.no_grad():
            expected.append(model(**inputs).logits[0, [place for place, *_ in one.answers]])
    use_packed_attention(model)
    with torch.no_grad():
        logits = [answer_logits(model, pack)[pack.answer_tokens >= 0] for pack in packs(encoded, SMALL)]
    # the two resize pictures by different code: PIL's and torchvision's bicubic filters differ by a rounding
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), atol=0.1, rtol=0.02)


def _picture(scene: Scene) -> Image.Image:
    return Image.open(io.BytesIO(scene.encoded())).convert("RGB")


def test_every_answer_of_an_example_is_learnt() -> None:
    """The marked tokens of a packed conversation spell its answers, each with the end of its turn."""
    encoder = Encoder(MODEL_DIR)
    examples = [draw_example(11, index) for index in range(8)]
    (pack,) = packs([encoder.encode(example) for example in examples], Sizes())
    learnt = pack.answer_tokens >= 0
    text = encoder.tokenizer.decode(pack.answer_tokens[learnt].tolist(), skip_special_tokens=False)
    answers = [turn.answer for example in examples for turn in example.turns]
    assert re.split(re.escape("<|im_end|>"), text)[:-1] == answers
    assert int(pack.answer_turns.max()) + 1 == len(answers)
