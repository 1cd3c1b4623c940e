"""Writes held-out pictures as files, with questions and right answers in questions.json: something to try the model on.

    python -m demo_model.show OUT [--n 8] [--seed 100]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo_model.data import CATEGORIES, draw_question


def write_pictures(out: Path, count: int, seed: int) -> list[dict[str, object]]:
    """`count` questions, of one category after the other. Returns what questions.json says: [{"pictures": file names,
    "history": earlier [question, answer], "question": ..., "answer": ..., "category": ...}]."""
    out.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, object]] = []
    for number in range(count):
        category = CATEGORIES[number % len(CATEGORIES)]
        example = draw_question(seed, number // len(CATEGORIES), category)
        names = []
        for place, scene in enumerate(example.scenes):
            names.append(f"{number:02d}_{category}{f'_{place + 1}' if len(example.scenes) > 1 else ''}"
                         f"{'.jpg' if scene.quality else '.png'}")
            (out / names[-1]).write_bytes(scene.encoded())
        *history, turn = example.turns
        listed.append({
            "pictures": names, "history": [[one.question, one.answer] for one in history], "question": turn.question,
            "answer": turn.answer, "category": category,
        })
    (out / "questions.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description="Write held-out pictures, questions and right answers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=len(CATEGORIES))
    parser.add_argument("--seed", type=int, default=100)
    arguments = parser.parse_args()
    for entry in write_pictures(arguments.out, arguments.n, arguments.seed):
        print(entry["pictures"], entry["question"], "->", entry["answer"])


if __name__ == "__main__":
    main()
