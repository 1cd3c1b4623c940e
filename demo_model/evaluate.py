"""Asks the demo model held-out questions and counts exact answers, through transformers or through mmv1.

    python -m demo_model.evaluate --backend transformers
    python -m demo_model.evaluate --backend mmv1

Writes evaluation_<backend>.json into the model's directory. Both backends are asked the same questions about the same picture
files and answer greedily in float32: transformers on the CPU, mmv1 on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from demo_model.data import CATEGORIES, Example, draw_question, held_out_questions
from demo_model.scene import HELD_OUT_PAIRS

MODEL_DIR = Path(__file__).parent / "qwen2.5-vl-demo"
MAX_TOKENS = 96
BATCH = 16  # conversations that transformers answers together
SWAPPED = ("caption", "colour", "shape", "text", "digit", "json")  # whose questions fit any picture that has an answer to them
PAIRS = 200
UNSEEN = "with_an_unseen_pair"  # of colour and shape

Answer = Callable[[Sequence[Example]], list[str]]


def answer_with_transformers(model_dir: Path) -> Answer:
    """Batches of conversations, with transformers' own processor, model and `generate`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_dir)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer_batch(examples: Sequence[Example]) -> list[str]:
        conversations = [
            example.messages([Image.open(io.BytesIO(scene.encoded())).convert("RGB") for scene in example.scenes])
            for example in examples
        ]
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

    def answer(examples: Sequence[Example]) -> list[str]:
        batches = [examples[at:at + BATCH] for at in range(0, len(examples), BATCH)]
        return [text for batch in batches for text in answer_batch(batch)]

    return answer


def answer_with_mmv1(model_dir: Path) -> Answer:
    """All conversations at once, as many together as the engine likes."""
    from mmv1 import LLM, SamplingParams

    engine = LLM(str(model_dir), dtype="float32")

    def answer(examples: Sequence[Example]) -> list[str]:
        conversations = [example.messages([scene.encoded() for scene in example.scenes]) for example in examples]
        outputs = engine.chat(conversations, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
        return [output.outputs[0].text for output in outputs]

    return answer


BACKENDS: dict[str, Callable[[Path], Answer]] = {"transformers": answer_with_transformers, "mmv1": answer_with_mmv1}


def swapped_pairs(count: int, seed: int = 1) -> list[tuple[Example, Example]]:
    """Pairs of held-out questions of one wording about two pictures that must be answered differently."""
    pairs: list[tuple[Example, Example]] = []
    waiting: dict[str, Example] = {}
    index = 0
    while len(pairs) < count:
        example = draw_question(seed, index // len(SWAPPED), SWAPPED[index % len(SWAPPED)])
        index += 1
        other = waiting.pop(example.turns[-1].question, None)
        if other is not None and other.turns[-1].answer != example.turns[-1].answer:
            pairs.append((other, example))
        else:
            waiting[example.turns[-1].question] = example
    return pairs


def swap_test(answer: Answer, count: int) -> float:
    """The percentage of pairs whose answers change places when their pictures do."""
    pairs = swapped_pairs(count)
    before = answer([example for pair in pairs for example in pair])
    after = answer([replace(one, scenes=other.scenes) for pair in pairs for one, other in (pair, pair[::-1])])
    held = [
        before[at] != before[at + 1] and (before[at], before[at + 1]) == (after[at + 1], after[at])
        for at in range(0, len(before), 2)
    ]
    return 100 * sum(held) / len(held)


def evaluate(answer: Answer, count: int, pairs: int) -> dict[str, Any]:
    """Exact answers in percent, over all, by category and where a pair that training never saw is shown; the swap test; what
    was wrong."""
    questions = held_out_questions(count)
    started = time.perf_counter()
    answers = answer(questions)
    seconds = time.perf_counter() - started
    rights: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for example, given in zip(questions, answers, strict=True):
        turn = example.turns[-1]
        right = given == turn.answer
        unseen = any(item.pair in HELD_OUT_PAIRS for scene in example.scenes for item in scene.items)
        for group in ("all", turn.category, *([UNSEEN] if unseen else [])):
            rights[group].append(right)
        if not right:
            wrong.append({"category": turn.category, "question": turn.question, "answer": turn.answer, "given": given})
    groups = [group for group in ("all", *CATEGORIES, UNSEEN) if rights[group]]
    shares = {group: round(100 * sum(rights[group]) / len(rights[group]), 2) for group in groups}
    return {
        "questions": count, "exact_percent": shares, "swap_pairs": pairs, "swapped_percent": swap_test(answer, pairs),
        "seconds_for_the_questions": round(seconds, 1), "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the demo model's exact answers to held-out questions.")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("-n", "--n", type=int, default=2000, help="questions")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of the swap test")
    parser.add_argument("--out", type=Path, help="the log; by default evaluation_<backend>.json in the model's directory")
    arguments = parser.parse_args()
    result = evaluate(BACKENDS[arguments.backend](arguments.model), arguments.n, arguments.pairs)
    names = ("torch", "transformers", "torchvision", "pillow")
    device = torch.cuda.get_device_name() if arguments.backend == "mmv1" and torch.cuda.is_available() else "cpu"
    log = {"backend": arguments.backend, "device": device, "dtype": "float32",
           "versions": {"python": platform.python_version()} | {name: version(name) for name in names}} | result
    out = arguments.out or arguments.model / f"evaluation_{arguments.backend}.json"
    out.write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(log | {"wrong": len(result["wrong"])}, indent=1))


if __name__ == "__main__":
    main()
