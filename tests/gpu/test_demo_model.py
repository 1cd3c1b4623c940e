"""The demo model says on the GPU what it says on the CPU, in float32 both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import SMALL, Record

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_QUESTIONS = 200

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# In a process of its own: which devices there are is settled before torch is imported.
SCRIPT = """
import json, sys
from demo_model.data import held_out_questions
from demo_model.evaluate import MAX_TOKENS, MODEL_DIR
from mmv1 import LLM, SamplingParams

count, settings = json.loads(sys.argv[1])
questions = held_out_questions(count, seed=21)
conversations = [example.messages([scene.encoded() for scene in example.scenes]) for example in questions]
with LLM(MODEL_DIR, dtype="float32", max_model_len=2048, **settings) as engine:
    answers = engine.chat(conversations, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=1))
    print(json.dumps({
        "device": engine.engine.ready.device,
        "expected": [example.turns[-1].answer for example in questions],
        "texts": [answer.outputs[0].text for answer in answers],
        "logprobs": [[step.sampled.logprob for step in answer.outputs[0].logprobs] for answer in answers],
    }))
"""


def ask(settings: dict[str, Any], **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, json.dumps([NUM_QUESTIONS, settings])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    output = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=800).stdout
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def on_the_cpu() -> dict[str, Any]:
    answers = ask({}, CUDA_VISIBLE_DEVICES="")
    assert answers["device"] == "cpu"
    return answers


@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True, "fused_kernels": False}], ids=["default", "plain, eager"])
def test_answers_are_those_of_the_cpu(settings: dict[str, Any], on_the_cpu: dict[str, Any], record: Record) -> None:
    on_the_gpu = ask(SMALL | settings)
    assert on_the_gpu["device"] != "cpu"
    pairs = list(zip(on_the_gpu["texts"], on_the_cpu["texts"], strict=True))
    of_both = zip(on_the_gpu["logprobs"], on_the_cpu["logprobs"], strict=True)
    worst = max(abs(a - b) for mine, theirs in of_both for a, b in zip(mine, theirs, strict=False))
    right = sum(text == answer for text, answer in zip(on_the_gpu["texts"], on_the_cpu["expected"], strict=True))
    figures = {"questions": len(pairs), "equal": sum(a == b for a, b in pairs), "right": right, "worst log-probability": worst}
    record(f"demo model against the CPU: {settings or 'default'}", figures)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert worst < 1e-3
    assert right > 0.93 * NUM_QUESTIONS
