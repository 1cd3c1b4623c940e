"""Pictures of one conversation, each within its own pixel limits: answered as transformers does with the same limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmv1.engine.llm import LLM
from mmv1.errors import ImageError, RequestError
from tests.integration.engines import greedy
from tests.integration.server import Server, body, image, text
from tests.oracle import HFOracle
from tests.pictures import decode, make_image

MIN, MAX = 4 * 784, 600 * 784  # of the engine here; the tiny model's own are 4 and 128 tokens
LOW = 512 * 512

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, max_pixels=MAX) as started:
        yield started


def conversation(*said: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """About as many pictures as `said`, in both spellings: with what is said beside each, and as transformers takes it."""
    sizes = [(900, 700), (800, 1000), (1200, 500), (60, 40), (640, 640), (30, 900)]
    mine: list[dict[str, Any]] = [text("Compare these:")]
    theirs: list[dict[str, Any]] = [text("Compare these:")]
    for seed, each in enumerate(said):
        encoded = make_image(*sizes[seed], seed=seed)
        mine.append({"type": "image", "image": encoded, **each})
        theirs.append({"type": "image", "image": decode(encoded)})
    question = text("What do they have in common?")
    return [{"role": "user", "content": [*mine, question]}], [{"role": "user", "content": [*theirs, question]}]


MIXED = [
    ([{}, {"detail": "low"}, {"detail": "high"}, {"detail": "auto"}], None, [(MIN, MAX), (MIN, LOW), (MIN, MAX), (MIN, MAX)]),
    (
        [{"max_pixels": 50_000}, {"detail": "low"}, {"detail": "low", "max_pixels": 300_000}, {"min_pixels": 90_000}, {}],
        {"min_pixels": 5000, "max_pixels": 200_000},
        [(5000, 50_000), (5000, 200_000), (5000, 300_000), (90_000, 200_000), (5000, 200_000)],
    ),
    ([{}, {"max_pixels": 1000}, {"detail": "low"}], {"size": {"longest_edge": 2000}}, [(2000, 2000), (1000, 1000), (2000, 2000)]),
]


@pytest.mark.parametrize(("said", "kwargs", "limits"), MIXED)
def test_mixed_settings_answer_as_transformers_does(
    large_llm: LLM, hf_oracle: HFOracle, said: list[dict[str, Any]], kwargs: dict[str, Any], limits: list[tuple[int, int]]
) -> None:
    mine, theirs = conversation(*said)
    (answer,) = large_llm.chat(mine, greedy(16, ignore_eos=True, logprobs=1), mm_processor_kwargs=kwargs)
    reference = hf_oracle(theirs, 16, ignore_eos=True, limits=limits)
    assert answer.prompt_token_ids == reference.prompt_token_ids
    assert answer.num_image_tokens == reference.prompt_token_ids.count(hf_oracle.model.config.image_token_id)
    assert answer.outputs[0].token_ids == reference.token_ids
    logprobs = reference.logits.log_softmax(-1)
    for step, (position, token_id) in enumerate(zip(answer.outputs[0].logprobs or (), reference.token_ids, strict=True)):
        assert position.sampled.logprob == pytest.approx(logprobs[step, token_id].item(), abs=1e-4)


def test_the_reference_puts_its_parts_together_as_the_processor_does(hf_oracle: HFOracle) -> None:
    _, theirs = conversation({}, {}, {})
    whole, parts = hf_oracle.inputs(theirs), hf_oracle.inputs_within(theirs, [(4 * 784, 128 * 784)] * 3)
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in parts)


def test_raw_prompts_take_processor_settings(large_llm: LLM) -> None:
    prompt = {"prompt": "<|image_pad|>What is it?", "multi_modal_data": {"image": decode(make_image(900, 700))}}
    whole, small = large_llm.generate([prompt, {**prompt, "mm_processor_kwargs": {"max_pixels": 50_000}}], greedy(1))
    assert small.num_image_tokens == 63 < whole.num_image_tokens
    assert small.num_prompt_tokens - small.num_image_tokens == whole.num_prompt_tokens - whole.num_image_tokens


def test_the_largest_picture_there_can_be_is_answered_and_a_larger_one_refused(large_llm: LLM) -> None:
    """Nothing waits for room that is nowhere. The largest by far is a picture that grows, both sides rounded up."""
    limits = {"min_pixels": MAX, "max_pixels": MAX}

    def tokens_of(width: int, height: int) -> int:
        (answer,) = large_llm.chat(
            [{"role": "user", "content": [{"type": "image", "image": make_image(width, height), **limits}, text()]}], greedy(1)
        )
        return answer.num_image_tokens

    preprocessor = large_llm.engine.preprocessor
    assert tokens_of(600, 4) == preprocessor.layout.max_image_tokens(large_llm.engine.max_model_len) == 600
    with pytest.raises(ImageError, match="600 at most"):
        tokens_of(480, 4)
    with pytest.raises(RequestError, match=str(MAX)):
        large_llm.chat([{"role": "user", "content": "Hello"}], mm_processor_kwargs={"max_pixels": MAX + 1})
    assert tokens_of(600, 4) == 600


# ---- over HTTP ----------------------------------------------------------------------------------------------------------


def shown(**said: Any) -> dict[str, Any]:
    part = image(make_image(640, 480, seed=60))
    return {**part, "image_url": {**part["image_url"], **said}}


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_the_pictures_tokens(server: Server, stream: bool) -> None:
    def image_tokens(*parts: dict[str, Any], **options: Any) -> int:
        request: dict[str, Any] = body([*parts, text()], **options)
        with server.client() as client:
            if not stream:
                usage = client.chat.completions.create(**request).usage
            else:
                request |= {"stream": True, "stream_options": {"include_usage": True}}
                with client.chat.completions.create(**request) as chunks:
                    usage = list(chunks)[-1].usage
        assert usage and usage.prompt_tokens_details
        found = usage.prompt_tokens_details.model_dump()["image_tokens"]
        assert isinstance(found, int) and usage.prompt_tokens > found
        return found

    whole = image_tokens(shown())
    assert whole == 117  # 13 x 9, within the tiny model's 128
    assert image_tokens() == 0
    assert image_tokens(shown(detail="auto"), shown(detail="high")) == 2 * whole
    assert image_tokens(shown(max_pixels=50_000)) == 54  # 9 x 6
    assert image_tokens(shown(), extra_body={"mm_processor_kwargs": {"max_pixels": 50_000}}) == 54
    both = {"mm_processor_kwargs": {"size": {"longest_edge": 50_000}}}
    assert image_tokens(shown(max_pixels=20_000), shown(), shown(max_pixels=100_352), extra_body=both) == 20 + 54 + whole


@pytest.mark.usefixtures("still_good")
@pytest.mark.parametrize(
    ("said", "options", "param", "number"),
    [
        ({"max_pixels": 100_353}, {}, "messages[0].content[0].image_url.max_pixels", "100352"),
        ({"min_pixels": 9, "max_pixels": 8}, {}, "messages[0].content[0].image_url.min_pixels", "8"),
        ({"min_pixels": 100_353}, {}, "messages[0].content[0].image_url.min_pixels", "100352"),
        ({}, {"mm_processor_kwargs": {"max_pixels": 100_353}}, "mm_processor_kwargs.max_pixels", "100352"),
        ({}, {"mm_processor_kwargs": {"size": {"longest_edge": 100_353}}}, "mm_processor_kwargs.size.longest_edge", "100352"),
        ({}, {"mm_processor_kwargs": {"fps": 2}}, "mm_processor_kwargs.fps", ""),
    ],
)
def test_limits_that_cannot_be_are_a_400(
    server: Server, said: dict[str, Any], options: dict[str, Any], param: str, number: str
) -> None:
    reply = server.post(body([shown(**said), text()], stream=True, **options))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert number in error["message"]
