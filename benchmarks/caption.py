"""`mmv1 caption` beside the same work done picture by picture: through LLM.chat, and through transformers' generate.

    python benchmarks/caption.py [--pictures N] [--out [FILE]]

The small model, N pictures of its generator (no two alike), "Describe this image.", greedy, float32 on a CPU, one after the
other on the same machine. What is counted is captioning, from the first picture to the last, not the start of an engine or the
loading of weights; for the command that is told too. transformers gets every TRANSFORMERS_SHARE-th picture: its rate is
that of those. All captions are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As an engine on a CPU is started; transformers gets the same, before torch is imported: it is as good for it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from environment import describe  # noqa: E402
from PIL import Image  # noqa: E402

from demo_model.scene import draw_scene  # noqa: E402
from mmv1 import LLM, SamplingParams  # noqa: E402
from mmv1.config import demo_model_dir  # noqa: E402

PROMPT = "Describe this image."
MAX_TOKENS = 64
TRANSFORMERS_SHARE = 10
RESULTS = Path(__file__).parent / "results" / "caption.json"


def draw_pictures(folder: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        scene = draw_scene(random.Random(f"caption {number}"), held_out=True)
        paths.append(folder / f"{number:05d}.{'jpg' if scene.quality else 'png'}")
        paths[-1].write_bytes(scene.encoded())
    return paths


def run_command(folder: Path, out: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Captions by file name; the command's own figure, and its whole time."""
    argv = ["caption", str(folder), "--prompt", PROMPT, "--max-tokens", str(MAX_TOKENS), "--output", str(out)]
    started = time.perf_counter()
    run = subprocess.run([sys.executable, "-m", "mmv1", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True)
    elapsed = time.perf_counter() - started
    told = re.search(r"captioned in ([\d.]+) s", run.stderr)
    assert told is not None, run.stderr
    stages = re.findall(r"bottleneck: ([a-zA-Z ]+)", run.stderr)
    print(f"mmv1 caption: bottleneck at the end: {stages[-1] if stages else 'not told'}", flush=True)
    captions = {row["key"]: row["caption"] for row in map(json.loads, out.read_text().splitlines())}
    return captions, {"seconds": float(told[1]), "seconds_with_start": round(elapsed, 1)}


def one_by_one(paths: list[Path], answer: Callable[[Path], str]) -> tuple[dict[str, str], dict[str, float]]:
    for path in sorted((ROOT / "examples" / "pictures").glob("*.jpg")):  # to warm up, with others
        answer(path)
    started = time.perf_counter()
    captions = {path.name: answer(path) for path in paths}
    return captions, {"seconds": round(time.perf_counter() - started, 1)}


def run_chat(paths: list[Path]) -> tuple[dict[str, str], dict[str, float]]:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    with LLM() as llm:

        def answer(path: Path) -> str:
            content = [{"type": "image", "image": path}, {"type": "text", "text": PROMPT}]
            return llm.chat([{"role": "user", "content": content}], params)[0].outputs[0].text.strip()

        captions, figures = one_by_one(paths, answer)
    return captions, figures


def run_transformers(paths: list[Path]) -> tuple[dict[str, str], dict[str, float]]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_model_dir())
    model = AutoModelForImageTextToText.from_pretrained(demo_model_dir(), dtype=torch.float32).eval()

    def answer(path: Path) -> str:
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        words: str = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return words.strip()

    return one_by_one(paths, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, metavar="FILE", help="write JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmv1-caption-") as folder:
        (pictures := Path(folder) / "pictures").mkdir()
        paths = draw_pictures(pictures, args.pictures)
        load_before = os.getloadavg()[0]
        subjects = {
            "mmv1 caption": lambda: run_command(pictures, Path(folder) / "captions.jsonl"),
            "LLM.chat, picture by picture": lambda: run_chat(paths),
            "transformers' generate, picture by picture": lambda: run_transformers(paths[::TRANSFORMERS_SHARE]),
        }
        captions: dict[str, dict[str, str]] = {}
        results: dict[str, dict[str, Any]] = {}
        for name, work in subjects.items():
            captions[name], figures = work()
            rate = len(captions[name]) / figures["seconds"]
            results[name] = {"pictures": len(captions[name]), **figures, "pictures_per_s": round(rate, 1)}
            print(f"{name}: {results[name]}", flush=True)
    ours = captions["mmv1 caption"]
    for name, theirs in captions.items():
        results[name]["same_captions"] = sum(ours[key] == text for key, text in theirs.items())
    result = {**describe(), "load_average_before": round(load_before, 2), "max_tokens": MAX_TOKENS, "results": results}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'':44}{'pictures':>10}{'pictures/s':>12}{'slower by':>11}{'same captions':>15}")
    best = results["mmv1 caption"]["pictures_per_s"]
    for name, row in results.items():
        times = f"{best / row['pictures_per_s']:.1f}x" if name != "mmv1 caption" else ""
        print(f"{name:44}{row['pictures']:>10}{row['pictures_per_s']:>12.1f}{times:>11}{row['same_captions']:>15}")


if __name__ == "__main__":
    main()
