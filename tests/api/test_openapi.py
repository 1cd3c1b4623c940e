"""Whatever the served OpenAPI document allows, and much that it does not, is answered: never with a status of 500 or more."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode

from tests.integration.server import Server, serving
from tests.tool_model import make_tool_model

_EXAMPLES = 80  # of each operation


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openapi")
    options = ("--max-model-len", "64", "--embedding-model", tiny_clip)
    with serving(make_tool_model(tiny_model_dir, folder / "model"), folder, *options) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_the_server(server: Server, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[int] = Counter()
    answered: Counter[str] = Counter()
    for result in document.get_all_operations():
        operation = result.ok()
        if not operation.body and mode is GenerationMode.NEGATIVE:
            continue  # nothing that could be wrong

        @seed(1)
        @settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_it(case: Case) -> None:
            if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
                # Another name would be refused before anything else is looked at.
                case.body["model"] = "tiny-clip" if case.path == "/v1/embeddings" else "tiny"
            while True:
                response = case.call()
                assert response.status_code < 500, response.text
                statuses[response.status_code] += 1
                answered[case.path] += response.status_code == 200
                if mode is GenerationMode.NEGATIVE or response.status_code != 400 or not isinstance(case.body, dict):
                    break
                param = re.split(r"[.\[]", response.json()["error"]["param"] or "")[0]
                if case.body.pop(param, None) is None:  # without what is refused, the request comes further
                    break

        try_it()
    assert statuses[200 if mode is GenerationMode.POSITIVE else 400] >= _EXAMPLES // 4, statuses
    assert mode is GenerationMode.NEGATIVE or answered["/v1/embeddings"] >= _EXAMPLES // 10, answered


def test_every_operation_and_body_is_in_the_document(server: Server) -> None:
    document = server.http.get(f"{server.url}/openapi.json").json()
    bodies = {
        path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    }
    assert bodies.items() >= {
        "/v1/chat/completions": "ChatCompletionRequest",
        "/v1/completions": "CompletionRequest",
        "/v1/embeddings": "EmbeddingRequest",
        "/tokenize": "TokenizeRequest",
        "/detokenize": "DetokenizeRequest",
    }.items()
    named = set(document["components"]["schemas"])
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= named
