"""Conversations about drawn pictures: several questions about one or more of them (questions.py). Everything follows from a seed.

    example = draw_example(seed=0, index=7)                      # training: a conversation of several questions
    question = draw_question(seed=0, index=7, category="count")  # held out: one question of a category

A training conversation asks several questions about the same pictures, one turn each; a held-out one asks one (or one after
another, where it refers back).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from demo_model.questions import (
    ONE_PICTURE,
    UNCOLOURED,
    Turn,
    ask_caption,
    ask_compare,
    ask_in_turns,
    ask_text_only,
    ask_uncoloured,
    ask_which_picture,
)
from demo_model.scene import Scene, draw_scene

SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = ("Answer shortly.", "You are an assistant that looks at pictures.", "Be precise and brief.")
CATEGORIES = (*ONE_PICTURE, "which_picture", "compare", "multi_turn", "text_only")


@dataclass(frozen=True)
class Example:
    """`scenes` are shown with the first question, before its text or, if `text_first`, after it."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    text_first: bool = False
    system: str = SYSTEM

    def messages(self, images: Sequence[object]) -> list[dict[str, object]]:
        """OpenAI-like messages up to the last question, `images` (one for each scene) as content parts {"type": "image"}."""
        messages: list[dict[str, object]] = []
        if self.system != SYSTEM:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for number, turn in enumerate(self.turns):
            content: list[dict[str, object]] = [{"type": "text", "text": turn.question}]
            if number == 0:
                shown: list[dict[str, object]] = [{"type": "image", "image": image} for image in images]
                content = content + shown if self.text_first else shown + content
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return messages[:-1]


def draw_example(seed: int, index: int) -> Example:
    """Training example `index` of `seed`: one to three pictures (or none) and several turns about them."""
    rng = random.Random(f"train/{seed}/{index}")
    kind = rng.random()
    system = rng.choice(OTHER_SYSTEMS) if rng.random() < 0.1 else SYSTEM
    text_first = rng.random() < 0.15
    if kind < 0.03:
        turns = [Turn(*ask_text_only(rng, False), "text_only") for _ in range(rng.randint(2, 6))]
        return Example((), _varied(rng, turns), False, system)
    if kind < 0.22:
        scenes = _several(rng, False)
        turns = _several_turns(rng, scenes)
    else:
        scenes = (draw_scene(rng, False),)
        named = scenes[0].colours_have_names
        turns = _one_picture_turns(rng, scenes[0]) if named else _uncoloured_turns(rng, scenes[0])
    if rng.random() < 0.02:
        turns.append(Turn(*ask_text_only(rng, False), "text_only"))
    return Example(scenes, _varied(rng, turns), text_first, system)


def _several(rng: random.Random, held_out: bool) -> tuple[Scene, ...]:
    kinds = rng.choice((("shapes",), ("shapes",), ("shapes", "print", "digit")))
    scenes: list[Scene] = []
    wanted = rng.randint(2, 3)
    while len(scenes) < wanted:
        scene = draw_scene(rng, held_out, kind=rng.choice(kinds), max_side=224)
        if scene.colours_have_names:
            scenes.append(scene)
    return tuple(scenes)


def _several_turns(rng: random.Random, scenes: Sequence[Scene]) -> list[Turn]:
    turns: list[Turn] = []
    while len(turns) < 5:
        category, asker = (("which_picture", ask_which_picture), ("compare", ask_compare))[rng.random() < 0.55]
        if (asked := asker(rng, scenes, False)) is not None:
            turns.append(Turn(*asked, category))
    return turns


def _one_picture_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    """Four to seven turns in random order. A caption tells most of the rest, so it is mostly the first or the last."""
    units: list[list[Turn]] = []
    wanted = rng.randint(4, 7)
    names, weights = list(ONE_PICTURE), [weight for _, weight in ONE_PICTURE.values()]
    weights[0] = 0.0
    for category in dict.fromkeys(rng.choices(names, weights, k=3 * wanted)):
        for _ in range(2 if category in ("count", "left_right", "above_below", "yes_no") else 1):
            if (asked := ONE_PICTURE[category][0](rng, scene, False)) is not None:
                units.append([Turn(*asked, category)])
    if turns := ask_in_turns(rng, scene, False):
        units.append(turns)
    rng.shuffle(units)
    units = units[:wanted]
    described = [Turn(*ask_caption(rng, scene, False), "caption")]  # type: ignore[misc]
    if rng.random() < 0.35:
        units = [described, *units[:2]]
    else:
        units.append(described)
    return [turn for unit in units for turn in unit]


def _uncoloured_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    """Two to four turns about shapes whose colours have no name."""
    turns = []
    for category in rng.choices(("size", "above_below", "left_right", "count", "absent"), k=rng.randint(1, 3)):
        if (asked := UNCOLOURED[category](rng, scene, False)) is not None:
            turns.append(Turn(*asked, category))
    turns.append(Turn(*ask_uncoloured(rng, scene, False), "uncoloured"))  # type: ignore[misc]
    return turns


def _varied(rng: random.Random, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """As people type: now and then without a capital or the last mark."""
    varied = []
    for turn in turns:
        question = turn.question
        if rng.random() < 0.08:
            question = question[:1].lower() + question[1:]
        if rng.random() < 0.08:
            question = question.rstrip("?.!")
        varied.append(Turn(question, turn.answer, turn.category))
    return tuple(varied)


def draw_question(seed: int, index: int, category: str) -> Example:
    """Held-out question `index` of `category`; the last turn is the one to be answered, those before it are the history."""
    rng = random.Random(f"held-out/{seed}/{category}/{index}")
    if category == "text_only":
        return Example((), (Turn(*ask_text_only(rng, True), category),))
    several = {"which_picture": ask_which_picture, "compare": ask_compare}.get(category)
    while True:
        if several is not None:
            scenes = _several(rng, True)
            asked = several(rng, scenes, True)
        else:
            kind = {"text": "print", "digit": "digit"}.get(category, "") if rng.random() < 0.7 else ""
            scenes = (draw_scene(rng, True, kind=kind),)
            if category == "multi_turn":
                if turns := ask_in_turns(rng, scenes[0], True):
                    return Example(scenes, tuple(turns))
                continue
            asked = ONE_PICTURE[category][0](rng, scenes[0], True)
        if asked is not None:
            return Example(scenes, (Turn(*asked, category),))


def held_out_questions(count: int, seed: int = 0) -> list[Example]:
    """`count` held-out questions, of every category equally many."""
    return [draw_question(seed, number // len(CATEGORIES), CATEGORIES[number % len(CATEGORIES)]) for number in range(count)]
