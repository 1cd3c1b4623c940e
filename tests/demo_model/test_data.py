"""The demo model's data: the same from the same seed, right about its own pictures, and held out where it says so."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from demo_model.data import CATEGORIES, Example, draw_example, draw_question, held_out_questions
from demo_model.questions import caption
from demo_model.scene import COLOURS, HELD_OUT_PAIRS, MAX_SIDE, MIN_SIDE, SHAPES, Item, Scene, render
from demo_model.words import is_held_out


def training(count: int) -> Iterator[Example]:
    return (draw_example(0, index) for index in range(count))


def held_out(category: str, count: int) -> Iterator[Example]:
    return (draw_question(0, index, category) for index in range(count))


def test_the_same_seed_gives_the_same_bytes_and_text() -> None:
    for index in range(30):
        first, again = draw_example(3, index), draw_example(3, index)
        assert first == again
        assert [scene.encoded() for scene in first.scenes] == [scene.encoded() for scene in again.scenes]
    assert held_out_questions(32) == held_out_questions(32)


def test_the_held_out_questions_are_those_of_the_kept_evaluations() -> None:
    """In another process and on another machine too. If this changes, the model is to be evaluated (and trained) again."""
    text = "\n".join(f"{turn.question} {turn.answer}" for example in held_out_questions(160) for turn in example.turns)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9f2756892691334d"


def test_another_seed_or_index_gives_another_example() -> None:
    examples = {repr(draw_example(seed, index)) for seed in range(3) for index in range(30)}
    assert len(examples) == 90


def test_training_has_nothing_that_is_held_out() -> None:
    forbidden = re.compile("|".join(f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS))
    for example in training(2500):
        for scene in example.scenes:
            for item in scene.items:
                assert item.pair not in HELD_OUT_PAIRS
                assert item.kind not in ("word", "number") or not is_held_out(item.text)
                assert item.kind != "digit" or item.style % 6 != 0
        for turn in example.turns:
            said = f"{turn.question} {turn.answer}"
            assert not forbidden.search(said)
            assert not [word for word in re.findall("[A-Z]{3,}", said) if word != "JSON" and is_held_out(word)]


def test_held_out_questions_show_what_training_never_did() -> None:
    pairs: Counter[tuple[str, str]] = Counter()
    for category in ("caption", "shape", "text", "digit"):
        for example in held_out(category, 150):
            for item in example.scenes[0].items:
                pairs[item.pair] += item.pair in HELD_OUT_PAIRS
                assert item.kind not in ("word", "number") or is_held_out(item.text)
                assert item.kind != "digit" or item.style % 6 == 0
    assert all(pairs[pair] for pair in HELD_OUT_PAIRS)


def test_sizes_and_formats_vary_within_the_limits() -> None:
    scenes = [scene for example in training(400) for scene in example.scenes]
    sides = [side for scene in scenes for side in (scene.width, scene.height)]
    assert MIN_SIDE <= min(sides) < 70
    assert 400 < max(sides) <= MAX_SIDE
    assert max(scene.width / scene.height for scene in scenes) > 3 < max(scene.height / scene.width for scene in scenes)
    starts = {scene.encoded()[:3] for scene in scenes[:60]}
    assert starts == {b"\xff\xd8\xff", b"\x89PN"}


def test_pictures_show_their_scenes() -> None:
    """The colour in the middle of each uncovered shape is the one the scene names, after the file's compression."""
    seen = 0
    for example in held_out("colour", 60):
        scene = example.scenes[0]
        pixels = np.asarray(Image.open(io.BytesIO(scene.encoded())).convert("RGB")).astype(float)
        assert pixels.shape == (scene.height, scene.width, 3)
        for item in scene.shapes:
            if all(other is item or abs(other.x - item.x) > (other.width + item.width) / 2 for other in scene.items):
                found = pixels[int(item.y) - 1:int(item.y) + 2, int(item.x) - 1:int(item.x) + 2].mean((0, 1))
                nearest = min(COLOURS, key=lambda name: float(np.abs(found - COLOURS[name]).sum()))
                assert nearest == item.colour
                seen += 1
    assert seen > 30


def test_things_stay_inside_and_apart() -> None:
    for example in training(300):
        for scene in example.scenes:
            xs = [item.x for item in scene.items]
            assert xs == sorted(xs)
            assert all(right - left >= 14 for left, right in pairwise(xs))
            for item in scene.items:
                assert item.x - item.width / 2 >= 0 and item.x + item.width / 2 <= scene.width
                assert item.y - item.height / 2 >= 0 and item.y + item.height / 2 <= scene.height
                assert min(item.width, item.height) >= 17


def test_the_background_follows_its_own_seed() -> None:
    noisy = next(scene for example in training(100) for scene in example.scenes if scene.texture == "noise")
    assert render(noisy).tobytes() == render(noisy).tobytes()
    other = Scene(**{**vars(noisy), "seed": noisy.seed + 1})
    assert render(other).tobytes() != render(noisy).tobytes()


# --- answers, worked out a second time from the question's words


def named(scene: Scene, name: str) -> Item:
    """The one thing that "the red star", "the star" or "the word" means."""
    words = name.removeprefix("the ").removeprefix("handwritten ").split()
    (item,) = [
        item for item in scene.items
        if words[-1] in (item.shape, item.kind) and (len(words) == 1 or words[0] == item.colour)
    ]
    return item


def check_colour(scene: Scene, question: str, answer: str) -> None:
    name = re.search(r"the ((handwritten )?\w+)( have)?\?$", question)
    assert name is not None
    assert named(scene, name[1]).colour == answer


def check_size(scene: Scene, question: str, answer: str) -> None:
    name = re.search(r"the (\w+ )??(\w+)( large or small| small or large)?\?$", question)
    assert name is not None
    assert named(scene, (name[1] or "") + name[2]).size == answer


def check_count(scene: Scene, question: str, answer: str) -> None:
    what = re.search(rf"(({'|'.join(COLOURS)}) )?(shapes|{'|'.join(SHAPES)})", question)
    assert what is not None
    counted = [item for item in scene.shapes if what[2] in (None, item.colour) and what[3] in ("shapes", item.shape)]
    assert answer == str(len(counted))


def check_left_right(scene: Scene, question: str, answer: str) -> None:
    if question.startswith(("Which", "What")):
        item = (min if "left" in question else max)(scene.shapes, key=lambda item: item.x)
        assert answer == f"{item.colour} {item.shape}"
        return
    names = re.findall(rf"the ((?:handwritten )?(?:(?:{'|'.join(COLOURS)}) )?(?:word|number|digit|{'|'.join(SHAPES)}))", question)
    one, other = (named(scene, name) for name in (names[::-1] if question.startswith("On") else names))
    assert answer == ("left" if one.x < other.x else "right")


def check_above_below(scene: Scene, question: str, answer: str) -> None:
    if question.startswith(("Which", "What")):
        item = (min if "top" in question else max)(scene.shapes, key=lambda item: item.y)
        assert answer == f"{item.colour} {item.shape}"
        return
    names = re.findall(rf"the ((?:handwritten )?(?:(?:{'|'.join(COLOURS)}) )?(?:word|number|digit|{'|'.join(SHAPES)}))", question)
    one, other = (named(scene, name) for name in names)
    assert answer in (("above", "higher") if one.y < other.y else ("below", "lower"))


def check_text(scene: Scene, question: str, answer: str) -> None:
    assert [answer] == [item.text for item in scene.items if item.kind in ("word", "number")]


def check_absent(scene: Scene, question: str, answer: str) -> None:
    (shape,) = [shape for shape in SHAPES if shape in question]
    assert answer == f"there is no {shape}"
    assert shape not in [item.shape for item in scene.items]


def check_yes_no(scene: Scene, question: str, answer: str) -> None:
    pair = re.search(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", question)
    turned = re.search(rf"Is the ({'|'.join(SHAPES)}) (\w+)\?", question)
    if pair is not None:
        truth = any(item.pair == pair.groups() for item in scene.items)
    elif turned is not None:
        truth = named(scene, turned[1]).colour == turned[2]
    else:
        kind = re.search("word|number|digit", question)
        assert kind is not None
        truth = any(item.kind == kind[0] for item in scene.items)
    assert answer == ("yes" if truth else "no")


def check_json(scene: Scene, question: str, answer: str) -> None:
    told = json.loads(answer)
    shown = {
        json.dumps({"size": item.size, "color": item.colour, "shape": item.shape}) if item.kind == "shape"
        else json.dumps({item.kind: item.text if item.kind == "word" else int(item.text)})
        for item in scene.items
    }
    parts = told if isinstance(told, list) else [told]
    assert {json.dumps(part) for part in parts} <= shown
    assert not isinstance(told, list) or len(told) == len(scene.items)


def check_caption(scene: Scene, question: str, answer: str) -> None:
    parts = re.split(", | and ", answer)
    assert len(parts) == len(scene.items)
    for part, item in zip(parts, sorted(scene.items, key=lambda item: item.x), strict=True):
        assert part.split()[-1] == (item.shape or item.text)
        assert all(word in part.split() for word in (item.size, item.colour) if item.kind == "shape")


CHECKS = {
    "caption": check_caption, "colour": check_colour, "size": check_size, "count": check_count, "left_right": check_left_right,
    "above_below": check_above_below, "text": check_text, "absent": check_absent, "yes_no": check_yes_no, "json": check_json,
}


@pytest.mark.parametrize("category", CHECKS)
def test_answers_are_right(category: str) -> None:
    for example in held_out(category, 120):
        (turn,) = example.turns
        CHECKS[category](example.scenes[0], turn.question, turn.answer)


def test_which_picture_and_compare_need_the_order_of_pictures() -> None:
    for example in held_out("which_picture", 60):
        (turn,) = example.turns
        number = ("first", "second", "third").index(re.search("first|second|third", turn.question)[0])  # type: ignore[index]
        if "shapes" not in turn.question and "olo" not in turn.question:
            assert turn.answer == caption(example.scenes[number])
    answers = Counter(example.turns[-1].answer for example in held_out("compare", 120))
    assert set(answers) == {"the first", "the second", "the third", "yes", "no"}


def test_every_category_is_asked_equally_often() -> None:
    counted = Counter(example.turns[-1].category for example in held_out_questions(320))
    assert counted == dict.fromkeys(CATEGORIES, 20)
