"""Whatever the engine does on its way, the answer is the same: chunks, caches, preemptions, neighbours, streams.

One set of conversations, asked one at a time of a roomy engine with cold caches, gives the answers to compare with. Then it is
asked of engines that are short of something, all at once, again, and in company.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mmv1.config import EngineArgs, resolve
from mmv1.engine.llm import LLM
from mmv1.engine.output_processor import CompletionOutput, RequestOutput
from mmv1.preprocess.layout import load_layout
from mmv1.step import ENCODER_CACHE_PAGE_ROWS
from mmv1.types import SamplingParams
from tests.integration.conversations import Case, make_cases, pictures_of, text_part
from tests.integration.engines import Counters, all_deltas_of, assert_same_answer, forget_caches, greedy, run_inside
from tests.pictures import make_image

pytestmark = pytest.mark.slow

NUM_CASES = 12
NUM_STRANGERS = 31
GREEDY = greedy(12, logprobs=5)
BLOCKS_FOR_FEW = 230  # of 4 tokens: the longest conversation and little more

ROOMY: dict[str, Any] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": ROOMY,
    "chunks of 5": {"max_num_batched_tokens": 5, "block_size": 4},
    "chunks of 16, tiny slab": {"max_num_batched_tokens": 16, "preprocess_slab_gb": "two pictures"},
    "chunks of 33, one at a time": {"max_num_batched_tokens": 33, "max_num_seqs": 1},
    "no prefix cache": {"enable_prefix_caching": False},
    "few blocks": {"num_gpu_blocks_override": BLOCKS_FOR_FEW, "block_size": 4},
    "tiny encoder cache": {"encoder_cache_bytes": "one picture"},
    "short of everything": {
        "num_gpu_blocks_override": BLOCKS_FOR_FEW,
        "block_size": 4,
        "max_num_batched_tokens": 40,
        "encoder_cache_bytes": "one picture",
        "preprocess_slab_gb": "two pictures",
    },
}
# Greedy answers hide much of what sampling depends on: the seed's position, penalties over prompt and output.
SAMPLED = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=12),
    SamplingParams(temperature=1.2, seed=2, top_k=20, max_tokens=12),
    SamplingParams(temperature=0.8, seed=3, top_p=0.9, min_p=0.01, max_tokens=12),
    SamplingParams(seed=4, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, max_tokens=12, ignore_eos=True),
]


@dataclass
class Asked:
    """Questions, and the answers the roomy engine gave to each alone, with cold caches."""

    cases: list[Case]
    answers: list[CompletionOutput] = field(default_factory=list)
    sampled: list[CompletionOutput] = field(default_factory=list)

    @property
    def messages(self) -> list[list[dict[str, Any]]]:
        return [case.messages for case in self.cases]

    def sampling(self) -> list[SamplingParams]:
        return [SAMPLED[index % len(SAMPLED)] for index in range(len(self.cases))]

    def assert_same(self, answers: list[RequestOutput], what: str = "") -> None:
        for case, answer, expected in zip(self.cases, answers, self.answers, strict=True):
            assert_same_answer(answer.outputs[0], expected, f"{case.name} {what}")

    def assert_same_sampled(self, answers: list[RequestOutput], what: str = "") -> None:
        for case, answer, expected in zip(self.cases, answers, self.sampled, strict=True):
            assert_same_answer(answer.outputs[0], expected, f"{case.name} {what}")


def alone_and_cold(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> CompletionOutput:
    forget_caches(llm)
    (answer,) = llm.chat(messages, params)
    assert answer.num_cached_tokens == 0
    return answer.outputs[0]


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return make_cases(NUM_CASES + NUM_STRANGERS, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def asked(llm: LLM, all_cases: list[Case]) -> Asked:
    asked = Asked(all_cases[:NUM_CASES])
    asked.answers = [alone_and_cold(llm, messages, GREEDY) for messages in asked.messages]
    asked.sampled = [alone_and_cold(llm, *each) for each in zip(asked.messages, asked.sampling(), strict=True)]
    forget_caches(llm)
    return asked


@pytest.fixture(scope="module")
def other_beginnings(llm: LLM, asked: Asked) -> Asked:
    """The same pictures behind another text, so that no KV of theirs can be used."""
    cases = []
    for case in asked.cases:
        messages = copy.deepcopy(case.messages)
        if messages[0]["role"] == "system":
            messages[0]["content"] = "Another beginning."
        else:
            messages.insert(0, {"role": "system", "content": "Another beginning."})
        cases.append(Case(f"{case.name}, another beginning", messages, []))
    other = Asked(cases)
    other.answers = [alone_and_cold(llm, messages, GREEDY) for messages in other.messages]
    forget_caches(llm)
    return other


@pytest.fixture(scope="module")
def setting(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(setting: str, llm: LLM, tiny_model_dir: Path) -> Iterator[LLM]:
    """An engine with one of SETTINGS, for all its tests; the roomy one is everybody's."""
    if not SETTINGS[setting]:
        yield llm
        return
    with LLM(tiny_model_dir, **in_bytes(SETTINGS[setting], tiny_model_dir)) as started:
        yield started


def in_bytes(settings: dict[str, Any], model_dir: Path) -> dict[str, Any]:
    """The settings with "one picture" and "two pictures" as what that is."""
    layout = load_layout(resolve(EngineArgs(model=str(model_dir))).model)
    num_tokens = layout.max_image_tokens(4096)
    sizes = {
        "encoder_cache_bytes": (num_tokens + 16) * 64 * 4,  # float32 [num_tokens, 64], and a page's rounding
        "preprocess_slab_gb": 2 * -(-layout.image_bytes(num_tokens) // 4096) * 4096 / (1 << 30),
    }
    return {**settings, **{name: size for name, size in sizes.items() if name in settings}}


def using(*settings: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("setting", settings, indirect=True)


def num_pictures(asked: Asked) -> int:
    return sum(len(pictures_of(case)) for case in asked.cases)


@using(*SETTINGS)
def test_all_at_once_and_cold(engine: LLM, asked: Asked, setting: str) -> None:
    forget_caches(engine)
    counters = Counters(engine)
    asked.assert_same(engine.chat(asked.messages, GREEDY), "together")
    assert counters.num_images_encoded >= num_pictures(asked)  # none of them twice in the set, so each was encoded
    if setting == "chunks of 5":
        assert counters.num_steps > sum(answer.num_prompt_tokens for answer in engine.chat(asked.messages, greedy(1))) / 5


@using(*SETTINGS)
def test_the_second_time(engine: LLM, asked: Asked, setting: str) -> None:
    """With whatever the caches hold after the first."""
    engine.chat(asked.messages, greedy(1))
    counters = Counters(engine)
    answers = engine.chat(asked.messages, GREEDY)
    asked.assert_same(answers, "again")
    assert counters.prefix_cache_hits == sum(answer.num_cached_tokens for answer in answers)
    if setting == "no prefix cache":
        assert counters.prefix_cache_hits == 0
        assert counters.encoder_cache_hits > 0
    if setting in ("roomy", "chunks of 5", "chunks of 16, tiny slab"):
        assert all(answer.num_cached_tokens >= answer.num_prompt_tokens - 16 for answer in answers)


@using(*SETTINGS)
def test_behind_another_beginning(engine: LLM, asked: Asked, other_beginnings: Asked, setting: str) -> None:
    """The pictures are known, their KV is of no use."""
    forget_caches(engine)
    engine.chat(asked.messages, greedy(1))
    counters = Counters(engine)
    other_beginnings.assert_same(engine.chat(other_beginnings.messages, GREEDY))
    if setting in ("roomy", "no prefix cache", "chunks of 5"):
        assert counters.num_images_encoded == 0
        assert counters.encoder_cache_hits > 20
    if setting in ("tiny encoder cache", "short of everything"):
        capacity = engine.stats().encoder_cache_capacity_bytes
        page = ENCODER_CACHE_PAGE_ROWS * 64 * 4
        most_kept = capacity // page  # a picture has a page at least; which are there at the end is a matter of timing
        assert counters.num_images_encoded >= num_pictures(asked) - most_kept  # evicted, and made again


@using(*SETTINGS)
def test_seeded_sampling(engine: LLM, asked: Asked) -> None:
    """Together twice, and at first alone: each time the same."""
    forget_caches(engine)
    params = asked.sampling()
    asked.assert_same_sampled(engine.chat(asked.messages, params), "together")
    asked.assert_same_sampled(engine.chat(asked.messages, params), "again")


@using("roomy", "few blocks", "short of everything")
def test_among_strangers(engine: LLM, asked: Asked, all_cases: list[Case], setting: str) -> None:
    forget_caches(engine)
    counters = Counters(engine)
    strangers = all_cases[NUM_CASES:]
    messages = [case.messages for case in strangers]
    params = [SAMPLED[index % len(SAMPLED)] for index in range(len(strangers))]
    for index in (0, 7):
        together = [*messages[:16], asked.messages[index], *messages[16:]]
        answers = engine.chat(together, [*params[:16], GREEDY, *params[16:]])
        assert_same_answer(answers[16].outputs[0], asked.answers[index], asked.cases[index].name)
    if setting == "few blocks":
        assert counters.num_preemptions > 0


@using("few blocks", "short of everything")
def test_preempted_while_generating(engine: LLM, llm: LLM) -> None:
    """Long answers to short prompts: what was generated before is kept, and counts as generated."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": make_image(90, 60 + 10 * seed, seed=seed)}, text_part("What?")]}]
        for seed in range(8)
    ]
    params = [msgspec.structs.replace(SAMPLED[i % 4], max_tokens=120, ignore_eos=True, logprobs=1) for i in range(8)]
    params[0] = params[1] = greedy(120, ignore_eos=True, logprobs=1)
    expected = [alone_and_cold(llm, *each) for each in zip(messages, params, strict=True)]
    forget_caches(engine)
    counters = Counters(engine)
    answers = engine.chat(messages, params)
    assert counters.num_preemptions > 0
    for index, answer in enumerate(answers):
        assert_same_answer(answer.outputs[0], expected[index], index)


@using("roomy")
def test_streamed(engine: LLM, asked: Asked) -> None:
    forget_caches(engine)
    num_deltas = 0  # a reader that falls behind, on a busy machine, reads several tokens at once
    for messages, expected in zip(asked.messages, asked.answers, strict=True):
        deltas = run_inside(engine, all_deltas_of(engine, messages, GREEDY))
        num_deltas += len(deltas)
        outputs = [output for delta in deltas for output in delta.outputs]
        whole = CompletionOutput(
            0,
            "".join(output.text for output in outputs),
            [token_id for output in outputs for token_id in output.token_ids],
            [position for output in outputs for position in output.logprobs or ()],
            outputs[-1].finish_reason,
        )
        assert_same_answer(whole, expected, "streamed")
    assert num_deltas > 2 * len(asked.messages)


@using("roomy", "few blocks")
def test_n_answers_are_those_of_n_seeds(engine: LLM, asked: Asked) -> None:
    messages = asked.messages[4]
    params = SamplingParams(temperature=1.0, seed=40, max_tokens=10, logprobs=2)
    (together,) = engine.chat(messages, msgspec.structs.replace(params, n=4))
    separate = engine.chat([messages] * 4, [msgspec.structs.replace(params, seed=40 + i) for i in range(4)])
    assert [output.index for output in together.outputs] == [0, 1, 2, 3]
    for output, answer in zip(together.outputs, separate, strict=True):
        assert_same_answer(output, answer.outputs[0], output.index)
    assert len({tuple(output.token_ids) for output in together.outputs}) > 1


PICTURE = make_image(250, 200, seed=5)


def raw_prompt(llm: LLM, before: int, after: list[int]) -> dict[str, Any]:
    """`before` tokens of text, the picture, and `after`, without a template between."""
    image_token_id = llm.engine.preprocessor.layout.image_token_id
    ids = [*range(40, 40 + before), image_token_id, *after]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": PICTURE}}


@using("roomy", "chunks of 5")
def test_a_hit_may_end_inside_a_picture(engine: LLM, llm: LLM) -> None:
    """Two prompts part right after the picture. Their last common block is the last that lies in the picture wholly."""
    block_size = engine.engine.config.cache.block_size
    num_tokens = len(engine.generate(raw_prompt(engine, 1, [50]), greedy(1))[0].prompt_token_ids or ()) - 2
    ended_inside = 0
    for before in range(1, block_size + 1, max(1, block_size // 4)):
        asked, other = raw_prompt(llm, before, [50, 51, 52]), raw_prompt(llm, before, [60, 61, 62])
        forget_caches(llm)
        (expected,) = llm.generate(other, GREEDY)
        forget_caches(engine)
        engine.generate(asked, greedy(1))
        (answer,) = engine.generate(other, GREEDY)
        end = before + num_tokens
        assert answer.num_cached_tokens == end // block_size * block_size
        ended_inside += answer.num_cached_tokens < end
        assert_same_answer(answer.outputs[0], expected.outputs[0], before)
    assert ended_inside


@using("few blocks")
def test_a_hit_may_end_at_any_block_of_a_picture(engine: LLM, llm: LLM) -> None:
    """Strangers take the last blocks of a prompt first. What is left is used, the rest computed again."""
    prompt = raw_prompt(engine, 6, [50, 51, 52])
    forget_caches(llm)
    (expected,) = llm.generate(prompt, GREEDY)
    num_prompt_tokens = expected.num_prompt_tokens
    hits = set()
    for num_left in range(2, num_prompt_tokens // 4, 3):
        forget_caches(engine)
        engine.generate(prompt, greedy(1))
        stranger = [200 + i % 50 for i in range(4 * (BLOCKS_FOR_FEW - 1 - num_left) - 1)]
        engine.generate({"prompt_token_ids": stranger}, greedy(1))
        (answer,) = engine.generate(prompt, GREEDY)
        assert_same_answer(answer.outputs[0], expected.outputs[0], num_left)
        hits.add(answer.num_cached_tokens)
    assert len({hit for hit in hits if 6 < hit < num_prompt_tokens - 3}) > 5


def test_answers_differ(asked: Asked, other_beginnings: Asked) -> None:
    """Or the comparisons above would show nothing."""
    both = asked.answers + other_beginnings.answers
    assert len({tuple(output.token_ids) for output in both}) == len(both)
    assert len({tuple(output.token_ids) for output in asked.sampled}) == NUM_CASES
