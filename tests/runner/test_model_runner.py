"""The runner against transformers and against itself: however a prompt is cut, batched, delayed or resumed, the tokens stay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples.tiny_model import FAMILIES
from mmv1.errors import EngineError
from mmv1.runner.platform import HostCopy
from mmv1.step import CachedRequestData, EncodeBatch, NewRequestData, SchedulerOutput
from mmv1.types import SamplingParams
from tests.oracle import HFOracle
from tests.runner.driver import GREEDY, Driver, Prompt, hf_inputs, make_picture, make_prompt, patch_of

MakeDriver = Callable[..., Driver]


@pytest.fixture(scope="module")
def two_pictures(image_token_id: int) -> Prompt:
    """Windows that fill and windows that do not; text before, between and after."""
    return make_prompt([5, make_picture(5, 3), 7, make_picture(1, 6), 9], image_token_id=image_token_id)


@pytest.fixture(scope="module")
def prompts(image_token_id: int) -> list[Prompt]:
    """Strangers to each other: no picture, one, the same one, several, a picture first and a picture last."""
    shared = make_picture(4, 4, seed=9)
    layouts = [[21], [3, make_picture(2, 2), 4], [3, shared, 2], [shared, 6], [8, shared, 1, make_picture(1, 1)],
               [1], [40, make_picture(6, 2), 1, make_picture(3, 3), 1, make_picture(1, 9), 5], [130]]
    return [make_prompt(layout, image_token_id=image_token_id, seed=i) for i, layout in enumerate(layouts)]


def generate(oracle: HFOracle, prompt: Prompt, image_token_id: int, max_tokens: int) -> list[int]:
    with torch.inference_mode():
        output = oracle.model.generate(
            **hf_inputs(prompt, oracle.processor, image_token_id), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
        )
    return output[0, len(prompt.token_ids) :].tolist()


def test_a_step_that_samples_nothing_is_waited_for(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what it reads, embeddings above all, could be overwritten while the device is at it."""
    log: list[str] = []
    event = SimpleNamespace(record=lambda: log.append("record"), synchronize=lambda: log.append("synchronize"))
    driver = make_driver()
    driver.add("a", make_prompt([9], image_token_id=0))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(driver.worker.platform, "copy_to_host", lambda tensors: HostCopy(tensors, is_cuda=True))
    driver.launch({"a": 5})
    assert log == ["record"]
    assert driver.collect().request_ids == []
    assert log == ["record", "synchronize"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers_at_every_chunk_size(
    make_driver: MakeDriver, hf_oracles: Callable[[str], HFOracle], family: str
) -> None:
    """Logits, and tokens: what a picture's token brings for later layers is cut where the chunk is, and text brings none."""
    oracle = hf_oracles(family)
    image_token_id = getattr(oracle.model.config, "image_token_id", -1)
    pictures = [make_picture(*size, patch=patch_of(family)) for size in ((5, 3), (1, 6))]
    prompt = make_prompt([5, pictures[0], 7, pictures[1], 9] if oracle.sees else [42], image_token_id=image_token_id)
    with torch.inference_mode():
        expected = oracle.model(**hf_inputs(prompt, oracle.processor, image_token_id)).logits[0, -1]
    tokens = generate(oracle, prompt, image_token_id, 4)
    driver = make_driver(family)
    for chunk in range(1, len(prompt.token_ids) + 1):
        torch.testing.assert_close(driver.first_logits(prompt, chunk), expected, atol=1e-4, rtol=1e-5)
        driver.add("b", prompt)
        assert driver.run(4, chunk=chunk)["b"] == tokens
        driver.finish("b")


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_greedy_tokens_equal_generate(
    make_driver: MakeDriver, hf_oracle: HFOracle, prompts: list[Prompt], image_token_id: int, chunk: int, block_size: int
) -> None:
    """All prompts in one batch, against transformers one by one."""
    driver = make_driver(block_size=block_size, num_blocks=2000)
    for i, prompt in enumerate(prompts):
        driver.add(str(i), prompt)
    answers = driver.run(8, chunk=chunk)
    for i, prompt in enumerate(prompts):
        assert answers[str(i)] == generate(hf_oracle, prompt, image_token_id, 8), i


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.5, seed=3, repetition_penalty=1.2)])
def test_a_request_answers_the_same_alone_and_among_strangers(
    make_driver: MakeDriver, prompts: list[Prompt], params: SamplingParams
) -> None:
    together, alone = make_driver(), make_driver()
    for i, prompt in enumerate(prompts):
        together.add(str(i), prompt, params)
    answers = together.run(12)
    for i, prompt in enumerate(prompts):
        alone.add("x", prompt, params)
        assert alone.run(12)["x"] == answers[str(i)], i
        alone.finish("x")


@pytest.mark.parametrize("depth", [2, 3])
def test_steps_run_before_the_tokens_of_earlier_ones_are_read(make_driver: MakeDriver, prompts: list[Prompt], depth: int) -> None:
    answers = []
    for in_flight in (1, depth):
        driver = make_driver()
        for i, prompt in enumerate(prompts):
            driver.add(str(i), prompt, SamplingParams(temperature=1.0, seed=i, frequency_penalty=0.5))
        answers.append(driver.run(20, chunk=16, depth=in_flight))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.5, seed=5, presence_penalty=1.0)])
def test_a_preempted_request_goes_on_as_if_nothing_had_happened(
    make_driver: MakeDriver, two_pictures: Prompt, params: SamplingParams
) -> None:
    driver = make_driver()
    driver.add("a", two_pictures, params)
    expected = driver.run(12)["a"]
    driver.finish("a")
    driver.add("a", two_pictures, params)
    driver.run(5)
    driver.preempt("a")
    assert driver.run(12, chunk=11)["a"] == expected


def test_a_prefix_hit_skips_pictures_that_are_covered(make_driver: MakeDriver, two_pictures: Prompt) -> None:
    driver = make_driver()
    driver.add("a", two_pictures)
    expected = driver.run(6)["a"]
    for picture in two_pictures.pictures:
        driver.drop_embedding(picture.mm_hash)
    hit = driver.requests["a"].block_ids[:2]  # 32 tokens: through the first picture and into the second
    driver.add("b", two_pictures)
    driver.requests["b"].block_ids, driver.requests["b"].computed = list(hit), 32
    assert driver.run(6)["b"] == expected
    assert driver.encoded == {two_pictures.pictures[1].mm_hash}


def test_pictures_encoded_ahead_and_several_at_once(make_driver: MakeDriver, prompts: list[Prompt]) -> None:
    """A step may encode for requests it does not run, or run nothing at all."""
    expected = make_driver()
    ahead = make_driver()
    for driver in (expected, ahead):
        for i, prompt in enumerate(prompts):
            driver.add(str(i), prompt)
    ahead.launch({}, ahead=tuple(picture for prompt in prompts for picture in prompt.pictures))
    assert ahead.collect().sampled_token_ids == []
    assert ahead.run(6) == expected.run(6)


def test_a_step_behind_a_batch_begins_when_that_has_been_launched(
    make_driver: MakeDriver, two_pictures: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, driver = make_driver(), make_driver()
    plain.add("a", two_pictures)
    expected = plain.run(3)["a"]
    driver.add("a", two_pictures)
    worker, encoder = driver.worker, driver.worker._runner.encoder
    encode, execute, wait_for = worker.encode, worker.execute, encoder._launching.wait_for
    batches: list[EncodeBatch] = []
    waits = threading.Event()

    def wait(predicate: Callable[[], object]) -> None:
        assert not predicate()
        waits.set()
        wait_for(predicate)

    def execute_behind(step: SchedulerOutput) -> object:
        """On a thread of its own, and the batch only when that waits for it."""
        if not batches:
            return execute(step)
        step.after_batch = batches[0].batch_id
        with ThreadPoolExecutor(1) as pool:
            launching = pool.submit(execute, step)
            assert waits.wait(10) and not launching.done()
            encode(batches.pop())
            return launching.result(10)

    def postpone(batch: EncodeBatch) -> SimpleNamespace:
        batches.append(batch)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(encoder._launching, "wait_for", wait)
    monkeypatch.setattr(worker, "encode", postpone)
    monkeypatch.setattr(worker, "execute", execute_behind)
    assert driver.run(3)["a"] == expected
    assert waits.is_set()


def test_the_device_waits_for_the_batch_that_is_followed_and_no_later_one(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_driver().worker._runner.encoder
    marks = iter(range(100, 200))
    waited: list[int] = []
    monkeypatch.setattr(encoder._platform, "mark", lambda: next(marks))
    monkeypatch.setattr(encoder._platform, "wait_for", waited.append)
    for batch_id in range(1, 20):
        encoder.encode(EncodeBatch(batch_id, [], []))
    for batch_id in (0, 18, 19, 1):
        encoder.follow(batch_id)
    assert waited == [117, 118, 111]  # the first is nobody's; the last has ended long ago: any later one says as much


def test_rows_are_used_again_when_requests_come_and_go(make_driver: MakeDriver, prompts: list[Prompt]) -> None:
    """Three rows, eight requests, in every state of progress when others leave."""
    reference = make_driver()
    driver = make_driver(max_num_seqs=3)
    rng = np.random.default_rng(0)
    waiting = [str(i) for i in range(len(prompts))]
    finished = {}
    while waiting or driver.requests:
        while waiting and len(driver.requests) < 3:
            i = waiting.pop(0)
            driver.add(i, prompts[int(i)])
        plan = {i: int(rng.integers(1, r.num_expected - r.computed + 1)) for i, r in driver.requests.items()}
        skipped = rng.choice(list(plan))  # not every request runs in every step
        if len(plan) > 1:
            del plan[skipped]
        driver.step(plan)
        for i in [i for i in driver.requests if len(driver.output_of(i)) >= 5]:
            finished[i] = driver.output_of(i)[:5]
            driver.finish(i)
    for i, prompt in enumerate(prompts):
        reference.add(str(i), prompt)
    assert finished == reference.run(5)


def test_logprobs_are_those_of_the_raw_logits(
    make_driver: MakeDriver, hf_oracle: HFOracle, prompts: list[Prompt], image_token_id: int
) -> None:
    driver = make_driver()
    asked = SamplingParams(temperature=0.7, seed=1, logprobs=3, repetition_penalty=1.7)
    driver.add("plain", prompts[0])
    driver.add("asked", prompts[1], asked)
    driver.add("none", prompts[2], SamplingParams(temperature=0.0, logprobs=0))
    answers = driver.run(4)
    assert driver.requests["plain"].logprobs == []
    with torch.inference_mode():
        whole = Prompt(prompts[1].token_ids + answers["asked"], prompts[1].features, prompts[1].pictures)
        logits = hf_oracle.model(**hf_inputs(whole, hf_oracle.processor, image_token_id)).logits[0]
    expected = logits.log_softmax(-1)[len(prompts[1].token_ids) - 1 :]
    for token_id, got, row in zip(answers["asked"], driver.requests["asked"].logprobs, expected, strict=False):
        top = row.topk(3)
        assert got.token_ids == [token_id, *top.indices.tolist()]
        np.testing.assert_allclose(got.logprobs, [row[token_id].item(), *top.values.tolist()], atol=1e-4)
        assert got.sampled_rank == int((row > row[token_id]).sum()) + 1
    for token_id, got in zip(answers["none"], driver.requests["none"].logprobs, strict=True):
        assert (got.token_ids, got.sampled_rank) == ([token_id], 1)


def test_requests_without_a_seed_depend_on_the_engines_seed(make_driver: MakeDriver, prompts: list[Prompt]) -> None:
    answers = []
    for seed in (0, 0, 1):
        driver = make_driver(seed=seed)
        driver.add("a", prompts[0], SamplingParams(temperature=2.0))
        driver.add("b", prompts[0], SamplingParams(temperature=2.0))
        answers.append(driver.run(10))
    assert answers[0] == answers[1]
    assert answers[0]["a"] != answers[0]["b"]
    assert answers[0]["a"] != answers[2]["a"]


def _step(**parts: object) -> SchedulerOutput:
    empty: dict[str, object] = {
        "step_id": 1, "num_scheduled_tokens": {}, "total_num_scheduled_tokens": 0, "new_requests": [],
        "cached_requests": CachedRequestData([], []), "finished_request_ids": [],
    }
    return SchedulerOutput(**(empty | parts))  # type: ignore[arg-type]


def test_a_step_that_contradicts_the_worker_is_refused(make_driver: MakeDriver, two_pictures: Prompt) -> None:
    worker = make_driver().worker
    new = NewRequestData("a", [1, 2, 3], 3, [], GREEDY, [1], 0)
    with pytest.raises(EngineError, match="which the worker does not know"):
        worker.execute(_step(finished_request_ids=["nobody"]))
    with pytest.raises(EngineError, match="does not hold"):
        worker.encode(EncodeBatch(1, [], [b"x" * 32]))
    with pytest.raises(EngineError, match="than are known"):
        worker.execute(_step(new_requests=[new], num_scheduled_tokens={"a": 4}))
    with pytest.raises(EngineError, match="known already"):
        worker.execute(_step(new_requests=[new]))
    uncached = NewRequestData("b", two_pictures.token_ids, 46, two_pictures.features, GREEDY, [1, 2, 3], 0)
    with pytest.raises(EngineError, match="does not hold"):
        worker.execute(_step(new_requests=[uncached], num_scheduled_tokens={"b": 30}))
