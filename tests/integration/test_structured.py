"""The form of answers and which tokens they are made of, through the server, on the demo model and with too little memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from mmv1.engine.llm import LLM
from mmv1.types import SamplingParams, StructuredOutputs
from tests.integration.engines import greedy
from tests.integration.server import Server, ask, body, image, serving, text
from tests.pictures import make_image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL_DIR = ROOT / "demo_model" / "qwen2.5-vl-demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "caption": {"type": "string", "maxLength": 30},
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    "required": ["caption", "colour", "count"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """KV for a few requests of the eight that may run."""
    options = ("--max-model-len", "320", "--num-gpu-blocks-override", "82", "--block-size", "4", "--max-num-seqs", "8",
               "--max-num-batched-tokens", "64")  # fmt: skip
    with serving(MODEL_DIR, tmp_path_factory.mktemp("demo"), *options) as started:
        yield started


def said(server: Server, request: dict[str, Any]) -> list[str]:
    answer = server.post(request)
    assert answer.status_code == 200, answer.text
    return [choice["message"]["content"] for choice in answer.json()["choices"]]


def check(content: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(content)
    jsonschema.validate(value, SCHEMA)
    return value


def question(number: int, **options: Any) -> dict[str, Any]:
    return body([image(make_image(84, 84, seed=number)), text("What is in this picture?")], **({"max_tokens": 120} | options))


def test_answers_follow_their_schema_among_others_and_through_preemptions(demo: Server) -> None:
    free = [question(seed, max_tokens=60, ignore_eos=True) for seed in range(4)]
    expected = [said(demo, request) for request in free]
    formed = [question(seed, temperature=1, seed=seed, response_format=JSON_SCHEMA) for seed in range(10)]
    with ThreadPoolExecutor(14) as threads:
        answers = list(threads.map(lambda request: said(demo, request), [*formed[:5], *free, *formed[5:]]))
    assert answers[5:9] == expected
    values = [check(content) for (content,) in answers[:5] + answers[9:]]
    assert len({value["caption"] for value in values}) > 1
    assert demo.metrics()["num_preemptions_total"] > 0
    assert [check(said(demo, request)[0]) for request in formed] == values  # alone, and with the prompt's prefix cached


def test_streams_and_several_answers(demo: Server) -> None:
    request = question(3, temperature=1, seed=5, n=3, response_format=JSON_SCHEMA, logprobs=True, top_logprobs=2)
    answer = demo.post(request).json()
    with demo.client() as client:
        texts = ["", "", ""]
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == [choice["message"]["content"] for choice in answer["choices"]]
    for choice in answer["choices"]:
        check(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        tokens = [position["token"] for position in choice["logprobs"]["content"]]
        assert "".join(tokens).startswith(choice["message"]["content"])


def test_the_official_client_parses_a_model_of_pydantic(demo: Server) -> None:
    class Scene(BaseModel):
        shape: str
        is_large: bool

    with demo.client() as client:
        request = question(1, max_tokens=240, logit_bias={}, temperature=1, seed=1)
        answer = client.chat.completions.parse(**request, response_format=Scene)
    assert isinstance(answer.choices[0].message.parsed, Scene)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
        ({"structured_outputs": {"regex": "[0-9]{3}-[ab]"}}, "[0-9]{3}-[ab]"),
        ({"guided_regex": "[0-9]{3}-[ab]"}, "[0-9]{3}-[ab]"),
        ({"structured_outputs": {"choice": ["a dog", "a cat"]}}, "a dog|a cat"),
        ({"guided_choice": ["a dog", "a cat"]}, "a dog|a cat"),
        ({"structured_outputs": {"grammar": 'root ::= "<" [a-c] [a-c] ">"'}}, "<[a-c]{2}>"),
        ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"guided_json": {"enum": [17, 18]}}, "17|18"),
        ({"structured_outputs": {"json": {"type": "boolean"}}, "ignore_eos": True, "min_tokens": 20}, "true|false"),
    ],
    ids=str,
)
def test_every_spelling(demo: Server, form: dict[str, Any], pattern: str) -> None:
    (content,) = said(demo, question(2, **({"temperature": 0.8, "seed": 4} | form)))

    assert re.fullmatch(pattern, content, re.DOTALL), content


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format", "type: x"),
        ({"guided_json": {"if": {}, "type": "object"}}, "guided_json", "if"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "nothing"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "one form"),
        ({"guided_regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids", "guided_regex"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "vocabulary"),
        ({"allowed_token_ids": [100000]}, "allowed_token_ids", "vocabulary"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "from 0 to 8"),
    ],
    ids=str,
)
def test_what_cannot_be_is_a_400(demo: Server, wrong: dict[str, Any], param: str, words: str) -> None:
    answer = demo.post(question(2, **wrong))
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == param and words in error["message"] and "\n" not in error["message"]
    assert demo.is_healthy()


def test_a_client_that_leaves_takes_its_grammar_along(demo: Server) -> None:
    request = question(5, max_tokens=240, structured_outputs={"regex": "[a-z ]{2000}"}, stream=True)
    for _ in range(3):
        with demo.http.stream("POST", f"{demo.url}/v1/chat/completions", json=request) as stream:
            next(stream.iter_lines())
    check(said(demo, question(5, response_format=JSON_SCHEMA, temperature=1, seed=2))[0])


def test_biases_bans_and_limits(llm: LLM, server: Server) -> None:
    """Against the greedy answer without them, token by token."""
    question = ask(make_image(100, 80, seed=3))
    vocabulary = llm.engine.config.model.vocab_size

    def ids(**options: Any) -> list[int]:
        (answer,) = llm.chat(question["messages"], greedy(8, **options))
        return answer.outputs[0].token_ids

    first = ids()
    banned = ids(logit_bias={first[0]: -100.0})
    assert banned[0] != first[0]
    assert ids(logit_bias={5: 100.0})[:3] == [5, 5, 5]
    assert set(ids(allowed_token_ids=(40, 41, 42))) <= {40, 41, 42}
    stopped = ids(stop_token_ids=(first[2],))
    assert stopped == first[: first.index(first[2]) + 1]
    patient = ids(stop_token_ids=(first[2],), min_tokens=6)
    assert len(patient) >= 6 and first[2] not in patient[:6]
    assert all(0 <= token < vocabulary for token in banned)
    answer = server.post({**question, "logit_bias": {"5": 100}, "max_tokens": 4, "logprobs": True, "ignore_eos": True}).json()
    tokens = [position["token"] for position in answer["choices"][0]["logprobs"]["content"]]
    assert len(set(tokens)) == 1


def test_bad_words_are_never_said(demo: Server) -> None:
    (content,) = said(demo, question(7, max_tokens=40))
    words = content.replace(",", "").split()
    for word in {words[0], words[1], words[-1]}:
        (without,) = said(demo, question(7, max_tokens=40, bad_words=[word]))
        assert word not in without.replace(",", "").split(), (word, without)


def test_offline(llm: LLM) -> None:
    form = StructuredOutputs(choice=("left", "right"))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, structured_outputs=form)
    answers = llm.chat([ask(make_image(60, 60, seed=i))["messages"] for i in range(4)], params)
    assert {answer.outputs[0].text for answer in answers} <= {"left", "right"}


def test_captions_follow_a_schema(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(make_image(90, 70, seed=i))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    command = ["caption", "pictures", "--schema", "schema.json", "--schema-tries", "1", "--max-tokens", "150"]
    command += ["--output", "out.jsonl"]
    run = subprocess.run(
        [sys.executable, "-m", "mmv1", *command], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        jsonschema.validate(row["caption"], SCHEMA)
