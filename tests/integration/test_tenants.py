"""Tenants of one server, and of servers that share a Redis: by the counters, nobody finds what another one left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server import Server, body, image, serving, text, wait_until
from tests.pictures import make_image
from tests.redis_server import RedisServer, running_redis

pytestmark = pytest.mark.slow

KEYS = ("sk-ann", "sk-bob", "sk-cat")
OPTIONS = ("--redis-min-bytes", "0", "--preprocess-workers", "1", "--max-model-len", "512", "--api-key", *KEYS)
HITS = ("prefix_cache_hits", "encoder_cache_hits", "preprocess_slab_hits", "preprocess_store_hits")
WORK = ("preprocess_decodes", "images_encoded")
LONG_TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 4


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def server(redis: RedisServer, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_model_dir, tmp_path_factory.mktemp("server"), "--redis-url", redis.url, *OPTIONS) as started:
        yield started


def ask(server: Server, key: str, picture: bytes, words: str = LONG_TEXT, **options: object) -> dict[str, float]:
    """What asking costs and saves: by how much each counter grows. The words stand before the picture."""
    before = server.metrics()
    asked = body([text(words), image(picture)], **options)
    answer = server.post(asked, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    after = server.metrics()
    grown = {name: after[f"{name}_total"] - before[f"{name}_total"] for name in (*HITS, *WORK)}
    grown["cached_tokens"] = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return grown


def wait_for_saves(server: Server, number: float) -> None:
    wait_until(lambda: server.metrics()["preprocess_store_saves_total"] >= number, 10, "the pictures are kept")


NOTHING_FOUND = {**dict.fromkeys(HITS, 0), **dict.fromkeys(WORK, 1), "cached_tokens": 0}


def test_one_tenant_finds_its_own_and_another_nothing(server: Server) -> None:
    picture = make_image(180, 250, 1)
    assert ask(server, "sk-ann", picture) == NOTHING_FOUND
    again = ask(server, "sk-ann", picture)
    assert again["prefix_cache_hits"] > 50
    assert again["cached_tokens"] > 50
    assert [again[name] for name in WORK] == [0, 0]
    elsewhere = ask(server, "sk-ann", picture, "Other words.")  # before the picture: only the embedding can be found
    assert (elsewhere["encoder_cache_hits"], elsewhere["images_encoded"]) == (1, 0)
    assert ask(server, "sk-bob", picture) == NOTHING_FOUND
    assert ask(server, "sk-bob", picture)["prefix_cache_hits"] > 50


def test_a_clients_own_salt_narrows_and_never_widens(server: Server) -> None:
    """The same salt of two tenants is not the same, and a salt keeps pictures apart, not only KV."""
    picture = make_image(180, 250, 2)
    assert ask(server, "sk-ann", picture, cache_salt="s") == NOTHING_FOUND
    assert ask(server, "sk-ann", picture, cache_salt="s")["prefix_cache_hits"] > 50
    assert ask(server, "sk-ann", picture, cache_salt="t") == NOTHING_FOUND
    assert ask(server, "sk-ann", picture)["images_encoded"] == 1
    assert ask(server, "sk-bob", picture, cache_salt="s") == NOTHING_FOUND


def test_so_it_is_through_redis(server: Server, redis: RedisServer, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A second server, which has nothing of its own, finds a tenant's picture and no other."""
    picture, words = make_image(180, 250, 3), f"Of another beginning. {LONG_TEXT}"
    saves = server.metrics()["preprocess_store_saves_total"]
    found = ask(server, "sk-ann", picture, words)
    assert {**found, "prefix_cache_hits": 0, "cached_tokens": 0} == NOTHING_FOUND  # the template's first words were there
    wait_for_saves(server, saves + 1)
    with serving(tiny_model_dir, tmp_path, "--redis-url", redis.url, *OPTIONS) as second:
        assert ask(second, "sk-bob", picture, words) == NOTHING_FOUND
        mine = ask(second, "sk-ann", picture, words)
        assert (mine["preprocess_store_hits"], mine["preprocess_decodes"], mine["images_encoded"]) == (1, 0, 1)
        wait_for_saves(second, 1)  # what the other tenant had to make again
    keys = redis.client().keys("*")
    assert not any(key in bytes(name) for name in keys for key in map(str.encode, KEYS))


def test_keys_are_not_in_the_log(server: Server) -> None:
    assert "API keys: 3" in server.log
    assert not any(key in server.log for key in KEYS)
