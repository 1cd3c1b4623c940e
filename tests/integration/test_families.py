"""Every family answers as transformers does on the same weights, whatever its engine is short of.

Conversations submitted all at once: about pictures of many sizes where the family sees, else text of up to several hundred
tokens. Qwen2.5-VL has these tests, and finer ones, in test_parity.py and test_equality.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.tiny_model import FAMILIES, VISION_FAMILIES
from mmv1.config import EngineArgs, resolve
from mmv1.engine.llm import LLM
from mmv1.engine.output_processor import RequestOutput
from mmv1.preprocess.layout import load_layout
from mmv1.step import ENCODER_CACHE_PAGE_ROWS
from tests.integration.conversations import SIZES, Case, make_cases, make_text_cases, pictures_of, text_part
from tests.integration.engines import Counters, assert_same_logprobs, assert_same_tokens, forget_caches, greedy, start_here
from tests.oracle import HFOracle, OracleAnswer
from tests.pictures import make_pil

pytestmark = pytest.mark.slow

NUM_CASES = 45
GREEDY = greedy(16, logprobs=20)
SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "few blocks": {"num_gpu_blocks_override": 260, "block_size": 4},  # the longest conversation and little more
    "chunks of 5, tiny encoder cache, no prefix cache": {
        "max_num_batched_tokens": 5,
        "block_size": 4,
        "encoder_cache_bytes": "one picture",
        "enable_prefix_caching": False,
    },
}
ROOMY, FEW_BLOCKS, CHUNKS = SETTINGS
NUM_IN_CHUNKS = 12  # conversations: their steps are many


@dataclass(frozen=True)
class Asked:
    """Questions to a family, what transformers answers, and its engines."""

    family: str
    model_dir: Path
    cases: list[Case]
    oracle: HFOracle
    references: list[OracleAnswer]
    engines: dict[str, LLM]

    def ask(self, engine: LLM, number: int = NUM_CASES) -> list[RequestOutput]:
        """So many questions at once; the answers have been compared."""
        answers = engine.chat([case.messages for case in self.cases[:number]], GREEDY)
        for case, answer, reference in zip(self.cases, answers, self.references, strict=False):
            name = f"{self.family} {case.name}"
            assert answer.prompt_token_ids == reference.prompt_token_ids, name
            assert_same_tokens(answer.outputs[0].token_ids, reference, name)
            likeliest = reference.first_logits.log_softmax(-1).topk(20)
            assert_same_logprobs(answer.outputs[0], likeliest.indices, likeliest.values, name)
        return answers

    def num_pictures(self, number: int = NUM_CASES) -> int:
        return sum(len(pictures_of(case)) for case in self.cases[:number])


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "qwen2_5_vl"])
def asked(
    request: pytest.FixtureRequest,
    tiny_model_dirs: Callable[[str], Path],
    hf_oracles: Callable[[str], HFOracle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Asked]:
    family = request.param
    model_dir, oracle = tiny_model_dirs(family), hf_oracles(family)
    sees = family in VISION_FAMILIES
    cases = make_cases(NUM_CASES, tmp_path_factory.mktemp("pictures")) if sees else make_text_cases(NUM_CASES)
    with ExitStack() as running, ThreadPoolExecutor() as threads:
        here = start_here(model_dir, [in_bytes(SETTINGS[name], model_dir) for name in (FEW_BLOCKS, CHUNKS)])
        short = [running.enter_context(engine) for engine in here]
        starting = threads.submit(LLM, model_dir)  # with a process of its own; meanwhile transformers answers
        references = [oracle(case.reference, GREEDY.max_tokens) for case in cases]
        engines = dict(zip(SETTINGS, [running.enter_context(starting.result()), *short], strict=True))
        yield Asked(family, model_dir, cases, oracle, references, engines)


def in_bytes(args: dict[str, Any], model_dir: Path) -> dict[str, Any]:
    """The settings with "one picture" as what that is in float32; a model that sees nothing has no such cache."""
    if "encoder_cache_bytes" not in args:
        return args
    vision = resolve(EngineArgs(model=str(model_dir))).model.hf_config.get("vision_config", {})
    num_levels = 1 + len(vision.get("deepstack_visual_indexes", ()))
    return {**args, "encoder_cache_bytes": rows_of_largest_picture(model_dir) * num_levels * 64 * 4 or None}


def rows_of_largest_picture(model_dir: Path) -> int:
    """Of the encoder cache, a page's rounding among them."""
    model = resolve(EngineArgs(model=str(model_dir))).model
    num_tokens = load_layout(model).max_image_tokens(model.max_model_len)
    return num_tokens + ENCODER_CACHE_PAGE_ROWS if num_tokens else 0


def test_the_conversations_are_varied(asked: Asked) -> None:
    lengths = [len(reference.prompt_token_ids) for reference in asked.references]
    pictures = [pictures_of(case) for case in asked.cases]
    assert len(asked.cases) >= 40
    assert min(lengths) < 60 and max(lengths) > 380
    assert {len(case.messages) for case in asked.cases} == {1, 2, 3, 4}
    assert len({tuple(reference.token_ids) for reference in asked.references}) > 40  # the model tells them apart
    if asked.family in VISION_FAMILIES:
        assert {len(listed) for listed in pictures} == {0, 1, 2, 3, 4}
        assert {image.size for listed in pictures for image in listed} == set(SIZES)


@pytest.mark.parametrize("setting", [ROOMY, FEW_BLOCKS])
def test_answers_are_transformers(asked: Asked, setting: str) -> None:
    """From cold caches, and a second time with whatever they then hold."""
    engine = asked.engines[setting]
    cold = Counters(engine)
    asked.ask(engine)
    assert cold.num_images_encoded >= asked.num_pictures()
    warm = Counters(engine)
    answers = asked.ask(engine)
    assert warm.prefix_cache_hits > 0
    if setting == ROOMY:
        assert warm.num_images_encoded == 0
        assert all(answer.num_cached_tokens == (answer.num_prompt_tokens - 1) // 16 * 16 for answer in answers)
    else:
        assert cold.num_preemptions > 0


def test_answers_in_small_chunks_are_transformers(asked: Asked) -> None:
    """Twice, and everything is computed twice, but for the few pictures that the encoder cache may still hold."""
    engine = asked.engines[CHUNKS]
    num_tokens = sum(len(reference.prompt_token_ids) for reference in asked.references[:NUM_IN_CHUNKS])
    most_kept = rows_of_largest_picture(asked.model_dir) // ENCODER_CACHE_PAGE_ROWS
    for num_kept in (0, most_kept):
        counters = Counters(engine)
        answers = asked.ask(engine, NUM_IN_CHUNKS)
        assert counters.num_steps > num_tokens / 5
        assert not any(answer.num_cached_tokens for answer in answers)
        assert counters.num_images_encoded >= asked.num_pictures(NUM_IN_CHUNKS) - num_kept


@pytest.mark.parametrize("setting", [ROOMY, FEW_BLOCKS])
def test_a_hit_may_end_inside_a_picture(asked: Asked, setting: str) -> None:
    """Two questions about one picture part right after it. Their last common block is the last that lies before that wholly."""
    if asked.family not in VISION_FAMILIES:
        pytest.skip("sees nothing")
    engine = asked.engines[setting]
    block_size, image_token_id = engine.engine.config.cache.block_size, asked.oracle.model.config.image_token_id
    forget_caches(engine)
    ended_inside = 0
    for seed, size in enumerate([(200, 210), (250, 333), (400, 300), (640, 480)]):
        picture = {"type": "image", "image": make_pil(*size, seed)}
        first, second = ([{"role": "user", "content": [picture, text_part(text)]}] for text in ("What is it?", "Describe it."))
        (before,) = engine.chat(first, greedy(1))
        (answer,) = engine.chat(second, GREEDY)
        reference = asked.oracle(second, GREEDY.max_tokens)
        assert_same_tokens(answer.outputs[0].token_ids, reference, f"{asked.family} {size}")
        begin = reference.prompt_token_ids.index(image_token_id)
        end = begin + reference.prompt_token_ids.count(image_token_id)
        pairs = zip(before.prompt_token_ids or (), reference.prompt_token_ids, strict=False)
        num_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        assert begin < answer.num_cached_tokens == num_common // block_size * block_size
        ended_inside += answer.num_cached_tokens < end
    assert ended_inside
