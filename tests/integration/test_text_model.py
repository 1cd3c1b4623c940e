"""A model of text alone behind a real server: nothing is there for pictures, and whoever sends one is told so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmv1.engine.llm import LLM
from mmv1.errors import ImageError
from tests.integration.engines import greedy, start_here
from tests.integration.errors import assert_is_clear_error
from tests.integration.server import POOL, Server, body, children_of, command_of, image, serving, text
from tests.oracle import HFOracle
from tests.pictures import make_image

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time there was a small house on a hill"
PICTURE = make_image(90, 60, seed=1)


@pytest.fixture(scope="module")
def llama(tiny_model_dirs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_model_dirs("llama"), tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def llama_here(tiny_model_dirs: Callable[[str], Path]) -> Iterator[LLM]:
    (started,) = start_here(tiny_model_dirs("llama"), [{}])
    with started:
        yield started


@pytest.fixture(scope="module")
def oracle(hf_oracles: Callable[[str], HFOracle]) -> HFOracle:
    return hf_oracles("llama")


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [text(each) for each in texts]}]


def continuation(oracle: HFOracle, prompt: str) -> tuple[list[int], list[int]]:
    """What transformers' tokenizer makes of a raw prompt, and the eight tokens after it."""
    inputs = oracle.processor(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = oracle.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    return ids, output[0, len(ids) :].tolist()


def test_nothing_is_there_for_pictures(llama: Server) -> None:
    assert not [pid for pid in children_of(llama.process.pid) if POOL in command_of(pid)]
    assert "0.0 MiB of picture embeddings" in llama.log


def test_chat_is_transformers(llama: Server, oracle: HFOracle) -> None:
    """Content in parts is one text of as many lines."""
    expected = oracle(parts("Which colours?", "And where?"), 8)
    answer = llama.post(body([text("Which colours?"), text("And where?")])).json()
    assert answer["choices"] == llama.post(body("Which colours?\nAnd where?")).json()["choices"]
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    written = oracle.processor.decode(expected.token_ids, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == written
    asked = {"messages": parts("Which colours?", "And where?")}
    assert llama.http.post(f"{llama.url}/tokenize", json=asked).json()["tokens"] == expected.prompt_token_ids


def test_a_raw_prompt_begins_as_transformers_tokenizer_begins_it(llama: Server, oracle: HFOracle) -> None:
    ids, expected = continuation(oracle, PROMPT)
    assert ids[0] == oracle.model.config.bos_token_id
    request = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    answer = llama.http.post(f"{llama.url}/v1/completions", json=request).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["text"] == oracle.processor.decode(expected, skip_special_tokens=True)
    assert llama.http.post(f"{llama.url}/tokenize", json={"prompt": PROMPT}).json()["tokens"] == ids
    by_ids = llama.http.post(f"{llama.url}/v1/completions", json=request | {"prompt": ids}).json()
    assert by_ids["choices"] == answer["choices"]


@pytest.mark.parametrize("path", ["v1/chat/completions", "tokenize"])
def test_a_picture_is_refused(llama: Server, path: str) -> None:
    asked = body([image(PICTURE), text("What is it?")])
    asked = asked if path.startswith("v1") else {"messages": asked["messages"]}
    response = llama.http.post(f"{llama.url}/{path}", json=asked)
    assert response.status_code == 400
    assert_is_clear_error(response)
    assert response.json()["error"]["code"] == "image_not_supported"
    assert "text only" in response.json()["error"]["message"]
    assert llama.post(body("Hello", max_tokens=1)).status_code == 200


def test_offline_it_is_the_same(llama_here: LLM, oracle: HFOracle) -> None:
    ids, expected = continuation(oracle, PROMPT)
    (answer,) = llama_here.generate(PROMPT, greedy(8))
    assert (answer.prompt_token_ids, answer.outputs[0].token_ids) == (ids, expected)
    assert llama_here.stats().encoder_cache_capacity_bytes == 0
    for ask in (
        lambda: llama_here.chat([{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]),
        lambda: llama_here.generate({"prompt": PROMPT, "multi_modal_data": {"image": PICTURE}}),
    ):
        with pytest.raises(ImageError, match="text only") as refusal:
            ask()
        assert refusal.value.code == "image_not_supported"
