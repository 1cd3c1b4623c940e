"""What is asked about drawn pictures, and the one right answer.

Answers have one canonical wording. Captions name things from left to right: "a large red circle, a small blue star and the
word LAMP".
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from demo_model.scene import COLOURS, HELD_OUT_PAIRS, MIN_DY, SHAPES, Item, Scene
from demo_model.words import draw_word

NTH = ("first", "second", "third")


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str
    category: str


# --- names of things


def phrase(item: Item) -> str:
    """How captions name it."""
    if item.kind == "shape":
        return f"a {item.size} {item.colour} {item.shape}"
    if item.kind == "digit":
        return f"a handwritten {item.text}"
    return f"the {item.kind} {item.text}"


def caption(scene: Scene) -> str:
    """Everything in the picture from left to right."""
    return joined([phrase(item) for item in scene.items])


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _name(item: Item, scene: Scene) -> str:
    """The shortest name that fits only this thing, with "the"; empty if none does."""
    if item.kind != "shape":
        alone = sum(other.kind == item.kind for other in scene.items) == 1
        return ("the handwritten digit" if item.kind == "digit" else f"the {item.kind}") if alone else ""
    if sum(other.shape == item.shape for other in scene.shapes) == 1:
        return f"the {item.shape}"
    if item.colour and sum(other.pair == item.pair for other in scene.shapes) == 1:
        return f"the {item.colour} {item.shape}"
    return ""


def _as_json(item: Item) -> dict[str, object]:
    if item.kind == "shape":
        return {"size": item.size, "color": item.colour, "shape": item.shape}
    return {item.kind: item.text if item.kind == "word" else int(item.text)}


# --- questions about one picture. Each returns (question, answer), or None where it cannot be asked.

Asked = tuple[str, str] | None
Asker = Callable[[random.Random, Scene, bool], Asked]


def ask_caption(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    templates = ("What is in this picture?", "Describe the picture.", "What do you see?", "Describe this image.",
                 "What is in the image?", "What does the picture show?", "Caption this picture.")
    return rng.choice(templates), caption(scene)


def ask_uncoloured(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    """The caption of a picture of shapes, less the colours."""
    templates = ("Describe this without colours.", "Describe the image without colors.", "Name the shapes, not the colours.")
    return rng.choice(templates), joined([f"a {item.size} {item.shape}" for item in scene.shapes])


def ask_colour(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    named = [(name, item) for item in scene.items if (name := _name(item, scene)) and name.count(" ") == 1]
    if not named:
        return None
    name, item = rng.choice(named)
    templates = ("What colour is {}?", "What color is {}?", "Which colour is {}?", "Which color does {} have?")
    return rng.choice(templates).format(name), item.colour


def ask_shape(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    shapes = scene.shapes
    asked = [(f"the {item.colour} one", item) for item in shapes if sum(other.colour == item.colour for other in shapes) == 1]
    if len(shapes) > 1:
        asked += [(f"the {item.size} one", item) for item in shapes if sum(other.size == item.size for other in shapes) == 1]
    if len(shapes) == 1:
        asked.append(("", shapes[0]))
    if not asked:
        return None
    name, item = rng.choice(asked)
    templates = ("What shape is {}?", "Which shape is {}?", "What is the shape of {}?") if name else ("Which shape is this?",)
    return rng.choice(templates).format(name), item.shape


def ask_size(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    named = [(name, item) for item in scene.shapes if (name := _name(item, scene))]
    if not named:
        return None
    name, item = rng.choice(named)
    return rng.choice(("Is {} large or small?", "Is {} small or large?", "What size is {}?")).format(name), item.size


def ask_count(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    if not scene.shapes:
        return None
    kind = rng.random()
    if kind < 0.4:
        what, count = "shapes", len(scene.shapes)
    elif kind < 0.7 and scene.colours_have_names:
        colour = rng.choice([item.colour for item in scene.shapes] * 2 + list(COLOURS))
        what, count = f"{colour} shapes", sum(item.colour == colour for item in scene.shapes)
    else:
        shape = rng.choice([item.shape for item in scene.shapes] * 2 + list(SHAPES))
        what, count = plural(shape), sum(item.shape == shape for item in scene.shapes)
    templates = ("How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the picture?")
    return rng.choice(templates).format(what), str(count)


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def ask_left_right(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    """Which side of another thing, or what is at an end."""
    named = [(name, item) for item in scene.items if (name := _name(item, scene))]
    shapes = scene.shapes
    if len(shapes) > 1 and scene.colours_have_names and (len(named) < 2 or rng.random() < 0.35):
        side = rng.choice(("left", "right"))
        item = shapes[0] if side == "left" else shapes[-1]
        templates = ("Which shape is on the far {}?", "What shape is farthest to the {}?", "Which shape is most to the {}?")
        return rng.choice(templates).format(side), f"{item.colour} {item.shape}"
    if len(named) < 2:
        return None
    (first, one), (second, other) = rng.sample(named, 2)
    templates = ("Is {} left or right of {}?", "Is {} to the left or to the right of {}?", "On which side of {1} is {0}?")
    return rng.choice(templates).format(first, second), "left" if one.x < other.x else "right"


def ask_above_below(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    """Above or below another thing, or what is at the top or bottom, where the heights clearly differ."""
    gap = max(14.0, MIN_DY * scene.height)
    by_height = sorted(scene.shapes, key=lambda item: item.y)
    if len(by_height) > 1 and scene.colours_have_names and rng.random() < 0.35:
        end, item, other = rng.choice((("top", *by_height[:2]), ("bottom", *by_height[:-3:-1])))
        if abs(item.y - other.y) >= gap:
            templates = ("Which shape is at the {}?", "What shape is nearest to the {}?")
            return rng.choice(templates).format(end), f"{item.colour} {item.shape}"
    named = [(name, item) for item in scene.items if (name := _name(item, scene))]
    pairs = [(first, second) for first in named for second in named if abs(first[1].y - second[1].y) >= gap]
    if not pairs:
        return None
    (first, one), (second, other) = rng.choice(pairs)
    templates = ("Is {} above or below {}?", "Is {} higher or lower than {}?")
    number = rng.randrange(2)
    words = (("above", "below"), ("higher", "lower"))[number]
    return templates[number].format(first, second), words[one.y > other.y]


def ask_text(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    printed = [item for item in scene.items if item.kind in ("word", "number")]
    if not printed:
        return None
    item = printed[0]
    templates = ["What is printed here?", "What does the text say?", "Read the text.", f"Which {item.kind} is shown?",
                 f"What is the {item.kind}?", f"Read the {item.kind}."]
    return rng.choice(templates), item.text


def ask_digit(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    digits = [item for item in scene.items if item.kind == "digit"]
    if not digits:
        return None
    if len(digits) == 2:
        number = rng.randrange(2)
        return f"Which handwritten digit is on the {('left', 'right')[number]}?", digits[number].text
    templates = ("Which digit is this?", "What digit is written by hand?", "Which handwritten digit is it?", "Read the digit.")
    return rng.choice(templates), digits[0].text


def ask_yes_no(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    """Whether something is there, or is as asked; yes and no come up equally often."""
    yes = rng.random() < 0.5
    if not scene.shapes or rng.random() < 0.12:
        kind = rng.choice(("word", "number", "handwritten digit"))
        there = any(item.kind == kind.removeprefix("handwritten ") for item in scene.items)
        return rng.choice(("Is there a {} in the picture?", "Do you see a {}?")).format(kind), "yes" if there else "no"
    item = rng.choice(scene.shapes)
    colour, shape = item.pair if yes else _other_pair(rng, scene, held_out)
    name = _name(item, scene)
    if rng.random() < 0.3 and name.count(" ") == 1:
        if not yes:
            colour = rng.choice([other for other in COLOURS if other != item.colour])
        if held_out or (colour, item.shape) not in HELD_OUT_PAIRS:
            return f"Is {name} {colour}?", "yes" if yes else "no"
        return None
    templates = ("Is there a {} {}?", "Is there a {} {} in the picture?", "Do you see a {} {}?", "Can you see a {} {}?")
    question = rng.choice(templates).format(colour, shape).replace(" a orange", " an orange")
    return question, "yes" if any(other.pair == (colour, shape) for other in scene.shapes) else "no"


def _other_pair(rng: random.Random, scene: Scene, held_out: bool) -> tuple[str, str]:
    """A pair that is not shown, but nearly: often its colour and its shape are, on different things."""
    shown = {item.pair for item in scene.shapes}
    item = rng.choice(scene.shapes)
    others = [rng.choice(scene.shapes) for _ in range(2)]
    near = [(item.colour, other.shape) for other in others] + [(item.colour, shape) for shape in SHAPES] + [
        (colour, item.shape) for colour in COLOURS
    ]
    return rng.choice([pair for pair in near if pair not in shown and (held_out or pair not in HELD_OUT_PAIRS)])


def ask_absent(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    """A question about a shape that is not there."""
    missing = [shape for shape in SHAPES if all(item.shape != shape for item in scene.shapes)]
    shape = rng.choice(missing)
    templates = ("What colour is the {}?", "What color is the {}?", "Is the {} large or small?", "What size is the {}?")
    return rng.choice(templates).format(shape), f"there is no {shape}"


def ask_json(rng: random.Random, scene: Scene, held_out: bool) -> Asked:
    if len(scene.items) <= 2 and rng.random() < 0.4:
        templates = ("Describe the picture as JSON.", "List everything as JSON.", "What is in this picture? Answer in JSON.")
        return rng.choice(templates), json.dumps([_as_json(item) for item in scene.items])
    named = [(name, item) for item in scene.items if (name := _name(item, scene))]
    if not named:
        return None
    name, item = rng.choice(named)
    templates = ("Describe {} as JSON.", "Give {} as JSON.", "Describe {} in JSON.")
    return rng.choice(templates).format(name), json.dumps(_as_json(item))


UNCOLOURED: dict[str, Asker] = {
    "size": ask_size, "above_below": ask_above_below, "left_right": ask_left_right, "count": ask_count, "absent": ask_absent,
}
ONE_PICTURE: dict[str, tuple[Asker, float]] = {  # and how often training asks it
    "caption": (ask_caption, 2.0), "colour": (ask_colour, 1.2), "shape": (ask_shape, 1.0), "size": (ask_size, 1.0),
    "count": (ask_count, 1.4), "left_right": (ask_left_right, 1.6), "above_below": (ask_above_below, 2.0),
    "text": (ask_text, 1.6), "digit": (ask_digit, 1.6), "yes_no": (ask_yes_no, 1.2), "absent": (ask_absent, 0.4),
    "json": (ask_json, 0.9),
}


# --- questions about several pictures


def ask_which_picture(rng: random.Random, scenes: Sequence[Scene], held_out: bool) -> Asked:
    """About one of the pictures by its number."""
    number = rng.randrange(len(scenes))
    nth = NTH[number]
    if rng.random() < 0.5:
        templates = ("What is in the {} picture?", "Describe the {} picture.", "What does the {} image show?")
        return rng.choice(templates).format(nth), caption(scenes[number])
    if rng.random() < 0.3 and scenes[number].shapes:
        return f"How many shapes are in the {nth} picture?", str(len(scenes[number].shapes))
    asked = ask_colour(rng, scenes[number], held_out)
    if asked is None:
        return None
    return asked[0].replace("?", f" in the {nth} picture?"), asked[1]


def ask_compare(rng: random.Random, scenes: Sequence[Scene], held_out: bool) -> Asked:
    """Which of the pictures, where exactly one is right; or whether all show a shape."""
    kind = rng.random()
    if kind < 0.35:
        what = rng.choice(("shapes", *SHAPES))
        counts = [sum(what in ("shapes", item.shape) for item in scene.shapes) for scene in scenes]
        if counts.count(max(counts)) != 1:
            return None
        word = what if what == "shapes" else plural(what)
        question = f"Which picture has more {word}?" if len(scenes) == 2 else f"Which picture has the most {word}?"
        return question, f"the {NTH[counts.index(max(counts))]}"
    if kind < 0.7:
        number = rng.randrange(len(scenes))
        item = rng.choice(scenes[number].items)
        has = [any(_alike(item, other) for other in scene.items) for scene in scenes]
        if sum(has) != 1:
            return None
        name = f"a {item.colour} {item.shape}".replace("a orange", "an orange") if item.kind == "shape" else phrase(item)
        return rng.choice(("Which picture shows {}?", "In which picture is {}?")).format(name), f"the {NTH[number]}"
    shapes = [item.shape for scene in scenes for item in scene.shapes]
    if not shapes:
        return None
    everywhere = [shape for shape in SHAPES if all(shape in [item.shape for item in scene.shapes] for scene in scenes)]
    shape = rng.choice(everywhere if everywhere and rng.random() < 0.7 else shapes)
    has = [any(item.shape == shape for item in scene.shapes) for scene in scenes]
    who = "both pictures" if len(scenes) == 2 else "all pictures"
    return rng.choice((f"Do {who} show a {shape}?", f"Is there a {shape} in {who}?")), "yes" if all(has) else "no"


def _alike(item: Item, other: Item) -> bool:
    return item.kind == other.kind and item.pair == other.pair if item.kind == "shape" else phrase(item) == phrase(other)


# --- turns that refer back, and turns without a picture


def ask_in_turns(rng: random.Random, scene: Scene, held_out: bool) -> list[Turn]:
    """Two or three turns, of which the later mean what the first named; empty if the scene does not allow it."""
    shapes = scene.shapes
    ends = {"left": 0, "right": -1}
    if len(shapes) < 2:
        return []
    side, other_side = rng.choice((("left", "right"), ("right", "left")))
    item = shapes[ends[side]]
    turns = [Turn(f"Which shape is on the far {side}?", f"{item.colour} {item.shape}", "left_right")]
    follow_ups = [
        Turn(rng.choice(("Is it large or small?", "What size is it?")), item.size, "multi_turn"),
        Turn(f"And on the far {other_side}?", "{0.colour} {0.shape}".format(shapes[ends[other_side]]), "multi_turn"),
    ]
    colours = sum(other.colour == item.colour for other in shapes) - 1
    follow_ups.append(Turn("How many other shapes have the same colour?", str(colours), "multi_turn"))
    neighbour = shapes[1] if side == "left" else shapes[-2]
    if abs(neighbour.y - item.y) >= max(14.0, MIN_DY * scene.height) and (name := _name(neighbour, scene)):
        follow_ups.append(Turn(f"Is it above or below {name}?", "above" if item.y < neighbour.y else "below", "multi_turn"))
    rng.shuffle(follow_ups)
    if follow_ups[0].question.startswith("And"):  # what follows "it" would then be the other one
        return turns + follow_ups[:1]
    return turns + follow_ups[: rng.randint(1, 2)]


_ABOUT_ITSELF = (
    ("Hello!", "Hello! Show me a picture and ask me about it."),
    ("Hi", "Hello! Show me a picture and ask me about it."),
    ("Who are you?", "I am a small vision-language model made to demonstrate mmv1."),
    ("What are you?", "I am a small vision-language model made to demonstrate mmv1."),
    ("What can you do?", "I can describe simple pictures: coloured shapes, printed words and numbers, and handwritten digits."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
)


def ask_text_only(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A question without a picture."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(_ABOUT_ITSELF)
    if kind < 0.6:
        word = draw_word(rng, held_out)
        return rng.choice(("Repeat the word {}.", "Say {}.", "Please write {}.")).format(word), word
    one, other = rng.sample(range(10), 2)
    if kind < 0.8:
        return rng.choice(("What is {} plus {}?", "How much is {} + {}?")).format(one, other), str(one + other)
    templates = ("Which is larger, {} or {}?", "Which number is larger: {} or {}?")
    return rng.choice(templates).format(one, other), str(max(one, other))
