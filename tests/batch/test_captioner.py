"""What is asked about a picture and what becomes of the answers: schemas, several captions, scores, seeds, faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmv1.batch import caption_job
from mmv1.batch.backend import Answer
from mmv1.batch.captioner import read_json, schema_validator
from mmv1.errors import ConfigError
from tests.batch.captioning import Captioning, captioning, make_pictures, rows, sidecars

__all__ = ["captioning"]  # a fixture

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["colour"],
    "additionalProperties": False,
}
GOOD = {"colour": "röd", "count": 2}


class FakeScorer:
    """A caption scores as many tenths as it has letters."""

    def __init__(self, model: str) -> None:
        self.model = model

    async def start(self) -> None: ...

    async def wait_ready(self) -> None: ...

    async def close(self) -> None: ...

    async def scores(self, picture: bytes, captions: Sequence[str]) -> list[float]:
        return [len(caption) / 10 for caption in captions]


@pytest.fixture(autouse=True)
def fake_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_job, "ClipScorer", FakeScorer)


def use_schema() -> None:
    make_pictures(Path("p"), 1)
    Path("s.json").write_text(json.dumps(SCHEMA))


def prompt_of(body: dict[str, Any]) -> str:
    text: str = body["messages"][0]["content"][1]["text"]
    return text


def test_the_schema_is_the_form_of_the_answer_which_is_an_object(captioning: Captioning) -> None:
    use_schema()
    captioning.backend.answer_texts = lambda body, picture: [f"```json\n{json.dumps(GOOD)}\n```"]
    assert captioning("p", "--schema", "s.json") == 0
    (body,) = captioning.backend.bodies
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA and "schema" not in prompt_of(body)
    assert rows(Path("p/captions.jsonl"))[0]["caption"] == GOOD
    assert json.loads(sidecars(Path("p"), ".json")["000"]) == GOOD  # the settings' file is no sidecar of a picture
    assert captioning("p", "--schema", "s.json", "--output", "a.parquet") == 0


def test_an_answer_that_breaks_the_schema_is_asked_for_again_with_another_seed(captioning: Captioning) -> None:
    use_schema()
    wrong = ["no JSON", '{"count": 1}', json.dumps(GOOD)]
    captioning.backend.answer_texts = lambda body, picture: [wrong[len(captioning.backend.bodies) - 1]]
    assert captioning("p", "--schema", "s.json") == 0
    first, second, third = captioning.backend.bodies
    assert "seed" not in first and first["temperature"] == 0  # greedily first
    assert second["seed"] != third["seed"] and second["temperature"] == third["temperature"] == 0.7


def test_a_schema_that_is_never_met_is_an_error(captioning: Captioning) -> None:
    use_schema()
    captioning.backend.answer_texts = lambda body, picture: ['{"colour": 3}']
    assert captioning("p", "--schema", "s.json", "--schema-tries", 2) == 3
    (error,) = rows(Path("p/errors.jsonl"))
    assert error["code"] == "schema_mismatch" and "in 2 tries: $.colour: 3 is not of type 'string'" in error["message"]
    assert len(captioning.backend.bodies) == 2 and not sidecars(Path("p"), ".txt")


def test_a_server_is_given_the_schema_and_one_that_refuses_it_finds_it_in_the_prompt(captioning: Captioning) -> None:
    use_schema()
    captioning.backend.answer_texts = lambda body, picture: [json.dumps(GOOD)]
    assert captioning("p", "--schema", "s.json", "--url", "http://somewhere", "--output", "a.jsonl") == 0
    (body,) = captioning.backend.bodies
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA and "schema" not in prompt_of(body)
    refusal = {"message": "response_format is not supported", "param": "response_format", "code": "unsupported_parameter"}
    captioning.backend.refuse = lambda body, picture: (400, refusal) if "response_format" in body else None
    make_pictures(Path("p"), 2)
    assert captioning("p", "--schema", "s.json", "--url", "http://somewhere", "--output", "b.jsonl") == 0
    assert len(rows(Path("b.jsonl"))) == 2
    asked_otherwise = [prompt_of(body) for body in captioning.backend.bodies if "response_format" not in body]
    assert len(asked_otherwise) == 2 and all(json.dumps(SCHEMA) in prompt for prompt in asked_otherwise)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"colour": "red"}', ""),
        (' ```\n{"colour": "red"}\n``` ', ""),
        ("red", "no JSON: red"),
        ("[" * 100_000, "no JSON: "),
        ('{"colour": "red", "size": 1}', "$: Additional properties"),
    ],
)
def test_json_in_an_answer(text: str, fault: str) -> None:
    found = read_json(text, schema_validator(SCHEMA))[1]
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_what_is_no_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="no JSON schema"):
        schema_validator({"type": 3})


def test_several_captions_and_the_best_of_them(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    captioning.backend.answer_texts = lambda body, picture: ["aa", "aaaa", "aaa"]
    assert captioning("p", "--num-captions", 3, "--output", "a.jsonl") == 0
    assert all(body["n"] == 3 and body["temperature"] == 1.0 for body in captioning.backend.bodies)
    assert {(row["caption"], tuple(row["captions"])) for row in rows(Path("a.jsonl"))} == {("aa", ("aa", "aaaa", "aaa"))}
    assert captioning("p", "--num-captions", 3, "--rank", "clip") == 0
    row = rows(Path("p/captions.jsonl"))[0]
    assert (row["caption"], row["clip_score"], row["clip_scores"]) == ("aaaa", 0.4, [0.2, 0.4, 0.3])
    assert set(sidecars(Path("p")).values()) == {"aaaa\n"}
    assert captioning("p", "--num-captions", 3, "--rank", "clip", "--output", "a.parquet") == 0
    import pyarrow.parquet

    assert pyarrow.parquet.read_table("a.parquet").to_pylist()[0]["clip_scores"] == [0.2, 0.4, 0.3]


def test_captions_below_the_least_score_fail(captioning: Captioning) -> None:
    make_pictures(Path("p"), 2)
    texts = iter(["a" * 9, "a" * 2])
    captioning.backend.answer_texts = lambda body, picture: [next(texts)]
    assert captioning("p", "--min-clip-score", 0.5) == 3
    (error,) = rows(Path("p/errors.jsonl"))
    assert error["code"] == "low_clip_score" and "scores 0.2, less than 0.5: aa" in error["message"]
    assert list(sidecars(Path("p")).values()) == ["a" * 9 + "\n"]


def test_a_seed_follows_from_the_picture_whatever_the_order(captioning: Captioning) -> None:
    make_pictures(Path("p"), 6)

    def seeds() -> dict[bytes, int]:
        bodies, captioning.backend.bodies = captioning.backend.bodies, []
        return {body["messages"][0]["content"][0]["image_url"]["url"].data: body["seed"] for body in bodies}

    captioning("p", "--temperature", 1, "--output", "a.jsonl")
    first = seeds()
    captioning("p", "--temperature", 1, "--output", "b.jsonl", "--max-inflight", 1)
    assert first == seeds() and len({*first.values()}) == 6


@pytest.mark.parametrize(
    ("status", "error", "ends"),
    [
        (400, {"message": "no", "param": "max_tokens", "code": "x"}, True),
        (404, {"message": "no such model", "param": "model", "code": "model_not_found"}, True),
        (401, {"message": "who are you"}, True),
        (400, {"message": "damaged", "param": "messages", "code": "invalid_image"}, False),
        (400, {"message": "too long", "param": "messages[0].content", "code": "context_length_exceeded"}, False),
        (400, {"message": "bad request"}, False),
        (500, {"message": "oh"}, False),
    ],
)
def test_whether_a_refusal_is_about_this_picture_or_any(
    captioning: Captioning, status: int, error: dict[str, Any], ends: bool
) -> None:
    make_pictures(Path("p"), 3)
    captioning.backend.refuse = lambda body, picture: (status, error)
    assert captioning("p", "--max-inflight", 1) == (2 if ends else 3)
    assert len(captioning.backend.bodies) == (1 if ends else 3)
    if not ends:
        assert rows(Path("p/errors.jsonl"))[0]["code"] == error.get("code", f"status_{status}")


@pytest.mark.parametrize(
    "body",
    [
        {"error": "text"},
        {"error": None},
        {"detail": "text"},
        {"object": "error", "message": "text", "param": None, "code": 400},
    ],
)
def test_errors_of_servers_that_have_their_own_form(captioning: Captioning, monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    make_pictures(Path("p"), 2)
    use_schema()

    async def ask(request: dict[str, Any]) -> Answer:
        return Answer(400, body, "")

    monkeypatch.setattr(captioning.backend, "ask", ask)
    assert captioning("p", "--schema", "s.json", "--url", "http://somewhere") == 3
    assert [row["message"] for row in rows(Path("p/errors.jsonl"))] == ["status 400" if body == {"error": None} else "text"] * 2


@pytest.mark.parametrize(
    "body",
    [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": None}}]}, {"choices": 1}],
)
def test_an_answer_without_text_is_a_fault_of_its_picture(
    captioning: Captioning, monkeypatch: pytest.MonkeyPatch, body: Any
) -> None:
    make_pictures(Path("p"), 2)

    async def ask(request: dict[str, Any]) -> Answer:
        return Answer(200, body, "")

    monkeypatch.setattr(captioning.backend, "ask", ask)
    assert captioning("p") == 3
    assert {row["code"] for row in rows(Path("p/errors.jsonl"))} == {"no_caption"}


@pytest.mark.parametrize("text", ['{"colour": "\\ud800"}', "NaN", '{"a": Infinity}'])
def test_json_that_cannot_be_written_is_none(text: str) -> None:
    assert read_json(text, schema_validator({}))[1].startswith("no JSON: ")


@pytest.mark.parametrize("reference", ["#/$defs/gone", "http://127.0.0.1:9/x.json", "#"])
def test_a_schema_that_leads_nowhere_is_a_fault_of_the_settings(captioning: Captioning, reference: str) -> None:
    make_pictures(Path("p"), 2)
    Path("s.json").write_text(json.dumps({"$ref": reference}))
    captioning.backend.answer_texts = lambda body, picture: ["1"]
    assert captioning("p", "--schema", "s.json") == 2
