"""Conversations about pictures of every size, kind and place, in two spellings: as mmv1 takes them and as transformers does.

Both see the same encoded bytes: mmv1 in whatever form `kind` says, transformers as Pillow decodes them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pictures import data_url, decode, make_image

# Width and height. The tiny model's pictures have 4 to 128 tokens of 28 x 28 pixels: the first ones are scaled up, the last ones
# down, and some fit as they are.
SIZES = [
    (1, 1), (2, 3), (17, 40), (28, 28), (300, 20), (12, 700), (700, 12), (56, 84), (140, 112), (97, 101), (224, 224), (252, 84),
    (333, 250), (250, 333), (317, 317), (640, 480), (400, 1100), (1200, 300), (1024, 1024), (1600, 60),
]  # fmt: skip
KINDS = ["jpeg bytes", "png bytes", "pil", "path", "data url", "png data url"]
TEXTS = [
    "What is in this picture?",
    "Describe it in one sentence, please.",
    "Which colours do you see, and where?",
    "Und was ist hier?",
    "Compare the two: what is the same?",
    "图片里有什么?",
    "Read the text in the image.",
    "Is the circle left of the square? 1 + 2 = 3",
]


@dataclass(frozen=True)
class Case:
    """One conversation in both spellings."""

    name: str
    messages: list[dict[str, Any]]
    reference: list[dict[str, Any]]


def picture_parts(size: tuple[int, int], kind: str, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One content part, as mmv1 takes it and as transformers does."""
    file_format = "PNG" if kind in ("png bytes", "png data url", "pil") else "JPEG"
    encoded = make_image(*size, seed=seed, format=file_format)
    pil = decode(encoded)
    if kind == "path":
        path = folder / f"{size[0]}x{size[1]}-{seed}.jpg"
        path.write_bytes(encoded)
        part = {"type": "image", "image": str(path) if seed % 2 else path}
    elif kind in ("data url", "png data url"):
        part = {"type": "image_url", "image_url": {"url": data_url(encoded, file_format)}}
    else:
        part = {"type": "image", "image": pil if kind == "pil" else encoded}
    return part, {"type": "image", "image": pil}


def pictures_of(case: Case) -> list[Any]:
    return [part["image"] for turn in case.reference for part in turn["content"] if part["type"] == "image"]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def make_cases(number: int, folder: Path) -> list[Case]:
    """`number` conversations with 0 to 4 pictures each, going through all sizes and kinds: text before, between and after the
    pictures, with and without a system prompt, one turn or several. The same for the same number."""
    cases = []
    num_pictures = 0
    for index in range(number):
        rng = random.Random(index)
        blocks: list[tuple[dict[str, Any], dict[str, Any]]] = []
        kinds = []
        for _ in range(index % 5):
            kinds.append(KINDS[num_pictures % len(KINDS)])
            blocks.append(picture_parts(SIZES[num_pictures % len(SIZES)], kinds[-1], num_pictures, folder))
            num_pictures += 1
        for _ in range(rng.randint(1, 3)):
            part = text_part(rng.choice(TEXTS))
            blocks.insert(rng.randint(0, len(blocks)), (part, part))
        messages, reference = _turns(blocks, rng)
        name = f"{index}: {len(messages)} turns, {', '.join(kinds) or 'no picture'}"
        cases.append(Case(name, messages, reference))
    return cases


def make_text_cases(number: int) -> list[Case]:
    """`number` conversations of text alone, of one turn or several with content in parts, from a few tokens to several hundred
    of the tiny model's. The same for the same number."""
    cases = []
    for index in range(number):
        rng = random.Random(index)
        parts = [text_part(" ".join(rng.choices(TEXTS, k=rng.choice((1, 2, 4, 8, 12))))) for _ in range(rng.randint(1, 4))]
        messages, reference = _turns([(part, part) for part in parts], rng)
        cases.append(Case(f"{index}: {len(messages)} turns, {len(parts)} parts", messages, reference))
    return cases


def _turns(blocks: Sequence[tuple[Any, Any]], rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parts as one user's turn, or as two with an assistant's between; half of them with a system prompt before."""
    turns: list[tuple[str, Any, Any]] = []
    if rng.random() < 0.5:
        system = rng.choice(TEXTS)
        turns.append(("system", system, [text_part(system)]))
    cut = rng.randint(1, len(blocks)) if len(blocks) > 1 and rng.random() < 0.5 else len(blocks)
    turns.append(("user", [part for part, _ in blocks[:cut]], [part for _, part in blocks[:cut]]))
    if cut < len(blocks):
        answer = rng.choice(TEXTS)
        turns.append(("assistant", answer, [text_part(answer)]))
        turns.append(("user", [part for part, _ in blocks[cut:]], [part for _, part in blocks[cut:]]))
    messages = [{"role": role, "content": content} for role, content, _ in turns]
    return messages, [{"role": role, "content": content} for role, _, content in turns]
