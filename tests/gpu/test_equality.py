"""The equality matrix on the device, in float32: however the engine gets there, the answer is the one given alone and cold.

The tests are those of the integration tests; what is added are the ways only a device has: graphs, fused kernels, streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmv1.engine.llm import LLM
from tests.gpu.conftest import SMALL
from tests.integration import test_equality as equality
from tests.integration.conversations import Case
from tests.integration.test_equality import Asked, in_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

all_cases, asked, other_beginnings, setting = equality.all_cases, equality.asked, equality.other_beginnings, equality.setting

PLAIN = {"enforce_eager": True, "fused_kernels": False}
SHARED = ("roomy", "chunks of 5", "no prefix cache", "few blocks", "short of everything")
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: equality.SETTINGS[name] for name in SHARED},
    "no graphs": {"enforce_eager": True},
    "no fused kernels": {"fused_kernels": False},
    "triton attention": {"attention_backend": "triton"},
    "plain torch": {**PLAIN, "attention_backend": "sdpa"},
    "all in line": {"encoder_stream": False, "async_scheduling": False},
    "short of everything, plain torch": {**equality.SETTINGS["short of everything"], **PLAIN, "attention_backend": "sdpa"},
}


@pytest.fixture(scope="module")
def engine(setting: str, llm: LLM, tiny_model_dir: Path) -> Iterator[LLM]:
    if setting == "roomy":
        yield llm
        return
    with LLM(tiny_model_dir, dtype="float32", **(SMALL | in_bytes(SETTINGS[setting], tiny_model_dir))) as started:
        yield started


using = equality.using


@using(*SETTINGS)
def test_all_at_once_and_cold(engine: LLM, asked: Asked, setting: str) -> None:
    equality.test_all_at_once_and_cold(engine, asked, setting)


@using(*SETTINGS)
def test_the_second_time(engine: LLM, asked: Asked, setting: str) -> None:
    equality.test_the_second_time(engine, asked, setting)


@using(*SETTINGS)
def test_behind_another_beginning(engine: LLM, asked: Asked, other_beginnings: Asked, setting: str) -> None:
    equality.test_behind_another_beginning(engine, asked, other_beginnings, setting)


@using(*SETTINGS)
def test_seeded_sampling(engine: LLM, asked: Asked) -> None:
    equality.test_seeded_sampling(engine, asked)


@using("roomy", "few blocks", "short of everything", "no fused kernels")
def test_among_strangers(engine: LLM, asked: Asked, all_cases: list[Case], setting: str) -> None:
    equality.test_among_strangers(engine, asked, all_cases, setting)


@using("few blocks", "short of everything", "short of everything, plain torch")
def test_preempted_while_generating(engine: LLM, llm: LLM) -> None:
    equality.test_preempted_while_generating(engine, llm)


@using("roomy", "chunks of 5", "no graphs", "triton attention")
def test_a_hit_may_end_inside_a_picture(engine: LLM, llm: LLM) -> None:
    equality.test_a_hit_may_end_inside_a_picture(engine, llm)


@using("few blocks")
def test_a_hit_may_end_at_any_block_of_a_picture(engine: LLM, llm: LLM) -> None:
    equality.test_a_hit_may_end_at_any_block_of_a_picture(engine, llm)


@using("roomy", "few blocks")
def test_n_answers_are_those_of_n_seeds(engine: LLM, asked: Asked) -> None:
    equality.test_n_answers_are_those_of_n_seeds(engine, asked)


def test_answers_differ(asked: Asked, other_beginnings: Asked) -> None:
    equality.test_answers_differ(asked, other_beginnings)
