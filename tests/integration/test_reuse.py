"""Work on a picture is done once, and never for the wrong one: shown by the engine's own counters and by each answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmv1.engine.llm import LLM
from tests.integration.engines import Counters, all_deltas_of, deltas_of, forget_caches, greedy, run_inside, tokens
from tests.oracle import HFOracle
from tests.pictures import data_url, decode, make_image

LONG_TEXT = "Look at the picture carefully, then answer in one word. "  # more than a block, between a picture and its question


def ask(text: str, *pictures: bytes) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def expected(oracle: HFOracle, text: str, *pictures: bytes, max_tokens: int = 8) -> list[int]:
    parts = [{"type": "image", "image": decode(picture)} for picture in pictures]
    return oracle([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], max_tokens).token_ids


def picture(seed: int, width: int = 250, height: int = 250) -> bytes:
    return make_image(width, height, seed=seed)


def test_a_second_question_does_nothing_twice(llm: LLM, hf_oracle: HFOracle) -> None:
    shown = picture(1)
    questions = [LONG_TEXT + "Which colours do you see?", LONG_TEXT + "How many shapes?"]
    (first,) = llm.chat(ask(questions[0], shown), greedy(8))
    counters = Counters(llm)
    (second,) = llm.chat(ask(questions[1], shown), greedy(8))
    assert counters.num_decodes == counters.num_pixel_requests == counters.num_images_encoded == counters.num_slab_hits == 0
    image_token_id = hf_oracle.model.config.image_token_id
    prompt = second.prompt_token_ids
    assert prompt is not None
    assert prompt.count(image_token_id) == 81
    end_of_picture = len(prompt) - prompt[::-1].index(image_token_id)
    assert end_of_picture <= second.num_cached_tokens == counters.prefix_cache_hits < second.num_prompt_tokens
    assert counters.num_prompt_tokens_computed == second.num_prompt_tokens - second.num_cached_tokens
    assert tokens([first, second]) == [expected(hf_oracle, question, shown) for question in questions]


def test_a_known_picture_behind_other_text_is_not_encoded_again(llm: LLM, hf_oracle: HFOracle) -> None:
    shown, other = picture(2), picture(3, 60, 60)
    llm.chat(ask("?", shown), greedy(1))
    counters = Counters(llm)
    (answer,) = llm.chat(ask("What has changed?", other, shown), greedy(8))
    assert counters.num_images_encoded == counters.num_decodes == 1  # the other one
    assert counters.encoder_cache_hits == 1
    assert answer.outputs[0].token_ids == expected(hf_oracle, "What has changed?", other, shown)


def test_an_evicted_embedding_is_made_again_from_the_slab(llm: LLM) -> None:
    shown = ask("What is it?", picture(4))
    (first,) = llm.chat(shown, greedy(8))
    forget_caches(llm)
    counters = Counters(llm)
    (second,) = llm.chat(shown, greedy(8))
    assert (counters.num_images_encoded, counters.num_slab_hits, counters.num_decodes) == (1, 1, 0)
    assert second.num_cached_tokens == 0
    assert tokens([first]) == tokens([second])


@pytest.fixture
def forgetful_llm(tiny_model_dir: Path) -> Iterator[LLM]:
    """Its encoder cache has room for one largest picture, its slab for two: the least there may be."""
    with LLM(tiny_model_dir, encoder_cache_bytes=(160 + 16) * 256, preprocess_slab_gb=740 * 1024 / (1 << 30)) as started:
        yield started


def test_a_picture_covered_by_the_kv_prefix_is_never_decoded(forgetful_llm: LLM) -> None:
    """Although the slab and the encoder cache have both forgotten it."""
    llm = forgetful_llm
    shown = picture(5)
    (cold,) = llm.chat(ask(LONG_TEXT + "Colours?", shown), greedy(8))
    other = ask("?", picture(10, 310, 310), picture(11, 310, 310))
    llm.chat(other, greedy(1))
    counters = Counters(llm)
    llm.chat([{"role": "system", "content": "Another beginning."}, *ask("?", shown)], greedy(1))
    assert counters.num_decodes == 1  # both had forgotten it: a prompt that needs it begins from its bytes,
    llm.chat([{"role": "system", "content": "Another beginning."}, *other], greedy(1))  # and both forget it again
    counters = Counters(llm)
    (warm,) = llm.chat(ask(LONG_TEXT + "Shapes?", shown), greedy(8))
    (again,) = llm.chat(ask(LONG_TEXT + "Colours?", shown), greedy(8))
    assert warm.num_cached_tokens > 81
    assert counters.num_decodes == counters.num_pixel_requests == counters.num_images_encoded == 0
    assert tokens([cold]) == tokens([again])


def test_64_requests_at_once_share_one_decode_and_one_encode(llm: LLM, hf_oracle: HFOracle) -> None:
    shown = picture(6)
    counters = Counters(llm)
    questions = [f"Question {number}?" for number in range(63)] + ["Which colours?"]
    answers = llm.chat([ask(question, shown) for question in questions], greedy(8))
    assert counters.num_images_probed == 64
    assert counters.num_decodes == counters.num_images_encoded == counters.num_pixel_requests == 1
    for index in (0, 31, 63):
        assert answers[index].outputs[0].token_ids == expected(hf_oracle, questions[index], shown)
    assert len({tuple(ids) for ids in tokens(answers)}) > 40


def test_pictures_never_take_each_others_place(llm: LLM, hf_oracle: HFOracle) -> None:
    """Pictures of one size, so their prompts have the same token ids: only the pictures tell the prompts apart."""
    a, b = picture(7), picture(8)
    prompts = [(a,), (b,), (a, b), (b, a), (a, a), (b, b)]
    references = [expected(hf_oracle, "What is it?", *shown) for shown in prompts]
    assert len({tuple(ids) for ids in references}) == len(prompts)
    for order in (prompts, prompts[::-1], prompts):
        answers = [llm.chat(ask("What is it?", *shown), greedy(8))[0].outputs[0].token_ids for shown in order]
        assert answers == [references[prompts.index(shown)] for shown in order]
    forget_caches(llm)
    assert tokens(llm.chat([ask("What is it?", *shown) for shown in prompts], greedy(8))) == references


def test_the_same_picture_twice_in_one_prompt_is_encoded_once(llm: LLM, hf_oracle: HFOracle) -> None:
    shown = picture(9, 120, 90)
    counters = Counters(llm)
    (answer,) = llm.chat(ask("Compare them.", shown, shown), greedy(8))
    assert counters.num_decodes == counters.num_images_encoded == 1
    assert answer.outputs[0].token_ids == expected(hf_oracle, "Compare them.", shown, shown)


def test_cache_salt_isolates(llm: LLM) -> None:
    """One tenant does not see, in its number of cached tokens, what another asked."""
    messages = ask(LONG_TEXT, picture(20))

    def cached(salt: str) -> int:
        deltas = run_inside(llm, all_deltas_of(llm, messages, greedy(2), cache_salt=salt))
        return max(delta.num_cached_tokens for delta in deltas)

    assert [cached("one"), cached("two")] == [0, 0]
    assert cached("") < 20  # the beginning of every unsalted prompt
    assert all(cached(salt) > 81 for salt in ("one", "two", ""))


def test_requests_that_are_given_up_leave_nothing_behind(llm: LLM) -> None:
    """Closed before, between and after their first tokens. Blocks, slots and bytes are free again, and the next is answered."""
    messages = [ask("What is it?", picture(seed)) for seed in range(30, 34)]

    async def give_up(index: int, num_deltas: int) -> None:
        deltas = deltas_of(llm, messages[index], greedy(500, ignore_eos=True))
        for _ in range(num_deltas):
            await anext(deltas)
        await deltas.aclose()

    async def give_up_all() -> None:
        waiting = asyncio.create_task(give_up(0, 1000))
        await asyncio.sleep(0)  # it has begun
        waiting.cancel()
        await asyncio.gather(waiting, *(give_up(index, index) for index in range(4)), return_exceptions=True)

    run_inside(llm, give_up_all())
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used) == (0, 0, 0)
    preprocess = llm.engine.preprocessor.stats()
    assert (preprocess.encoded_bytes, preprocess.num_waiting_for_slab) == (0, 0)
    (answer,) = llm.chat(messages[0], greedy(8))
    assert len(answer.outputs[0].token_ids) == 8
