"""Servers that share a Redis: no picture is decoded twice among them, and whatever happens to Redis, every answer is right."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.server import Server, ask, serving, wait_until
from tests.pictures import decode, make_image
from tests.redis_server import RedisServer, running_redis

if TYPE_CHECKING:
    from tests.oracle import HFOracle

pytestmark = pytest.mark.slow

# The caches before the store are as small as they may be, so that pictures come from it again and again.
OPTIONS = (
    *("--redis-min-bytes", "0", "--preprocess-workers", "1", "--max-model-len", "512", "--preprocess-slab-gb", "0.0025"),
    *("--no-enable-prefix-caching", "--encoder-cache-bytes", "140000"),
)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def servers(redis: RedisServer, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(serving(tiny_model_dir, tmp_path_factory.mktemp("server"), "--redis-url", redis.url, *OPTIONS))
            for _ in range(2)
        ]


def answer(server: Server, picture: bytes) -> str:
    response = server.post(ask(picture))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def expected(oracle: HFOracle, picture: bytes) -> str:
    content = [{"type": "image", "image": decode(picture)}, {"type": "text", "text": "What is in this picture?"}]
    token_ids = oracle([{"role": "user", "content": content}], max_new_tokens=8).token_ids
    return oracle.processor.tokenizer.decode(token_ids, skip_special_tokens=True)


def count(servers: list[Server], *names: str) -> list[float]:
    """Each counter's sum over the servers."""
    samples = [server.metrics() for server in servers]
    return [sum(sample[f"{name}_total"] for sample in samples) for name in names]


def wait_for_saves(servers: list[Server], number: float) -> None:
    def saved() -> bool:
        return sum(count(servers, "preprocess_store_saves", "preprocess_store_failures")) >= number

    wait_until(saved, 10, "the pictures are kept")


def test_what_one_server_has_processed_the_other_does_not_decode(servers: list[Server], hf_oracle: HFOracle) -> None:
    first, second = servers
    pictures = [make_image(180 + 40 * number, 250, number) for number in range(5)]
    wanted = [expected(hf_oracle, picture) for picture in pictures]
    assert [answer(first, picture) for picture in pictures] == wanted
    wait_for_saves([first], 5)
    assert [answer(second, picture) for picture in pictures] == wanted
    assert count([second], "preprocess_decodes", "preprocess_store_hits", "images_encoded") == [0, 5, 5]


def test_64_requests_to_two_servers_cause_one_decode_and_one_encode_each(servers: list[Server], hf_oracle: HFOracle) -> None:
    picture = make_image(500, 400, 77)
    before = [count([server], "preprocess_decodes", "images_encoded") for server in servers]
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda number: answer(servers[number % 2], picture), range(64)))
    assert set(answers) == {expected(hf_oracle, picture)}
    after = [count([server], "preprocess_decodes", "images_encoded") for server in servers]
    assert [new[1] - old[1] for new, old in zip(after, before, strict=True)] == [1, 1]
    assert sum(new[0] - old[0] for new, old in zip(after, before, strict=True)) == 1


def test_a_restarted_server_decodes_nothing(
    servers: list[Server], redis: RedisServer, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its address in the environment."""
    picture = make_image(333, 222, 9)
    saves = sum(count(servers, "preprocess_store_saves", "preprocess_store_failures"))
    wanted = answer(servers[0], picture)
    wait_for_saves(servers, saves + 1)
    monkeypatch.setenv("REDIS_URL", redis.url)
    with serving(tiny_model_dir, tmp_path, *OPTIONS) as restarted:
        assert answer(restarted, picture) == wanted
        assert count([restarted], "preprocess_decodes", "preprocess_store_hits") == [0, 1]


def spoil(redis: RedisServer, stop: threading.Event) -> None:
    """Everything that can happen to Redis, over and over."""
    rng = random.Random(5)

    def change_values() -> None:
        client = redis.client()
        keys = sorted(client.keys("*"))
        values = dict(zip(keys, client.mget(keys), strict=True)) if keys else {}
        for key, value in values.items():
            same_size = [other for other in values.values() if other and value and len(other) == len(value)]
            inverted = bytes(byte ^ 0xFF for byte in value or b"")
            if rng.random() < 0.2:
                client.set(key, rng.choice([(value or b"")[:-7], inverted, rng.choice(same_size or [b""]), b"MMV1"]))

    def swap_pictures() -> None:
        """Whole pictures, each under another one's key."""
        client = redis.client()
        metas = client.keys("*:meta")
        metas = rng.sample(metas, len(metas) // 3)
        for one, other in zip(metas[::2], metas[1::2], strict=False):
            pair = [(key, key.replace(b":meta", b":0")) for key in (one, other)]
            values = [client.mget(keys) for keys in pair]
            for keys, taken in zip(pair, reversed(values), strict=True):
                client.mset({key: value or b"" for key, value in zip(keys, taken, strict=True)})

    def restart() -> None:
        redis.kill()
        stop.wait(0.3)
        redis.start()

    def hang() -> None:
        redis.suspend()
        stop.wait(0.3)
        redis.resume()

    def fill() -> None:
        client = redis.client()
        client.config_set("maxmemory", rng.choice(["1mb", "4mb"]))
        client.config_set("maxmemory-policy", rng.choice(["noeviction", "allkeys-lru"]))
        stop.wait(0.3)
        client.config_set("maxmemory", "0")

    while not stop.is_set():
        (blow,) = rng.choices([change_values, swap_pictures, restart, hang, fill], weights=[6, 6, 1, 1, 1])
        blow()
        stop.wait(0.2)


def test_no_request_fails_and_none_is_answered_wrongly_whatever_happens_to_redis(
    servers: list[Server], redis: RedisServer, hf_oracle: HFOracle
) -> None:
    pictures = [make_image(300 + 40 * (number // 6), 320, 300 + number) for number in range(24)]  # of four sizes
    wanted = {picture: expected(hf_oracle, picture) for picture in pictures}
    assert len(set(wanted.values())) > 12
    def num_hits() -> float:
        return sum(count(servers, "preprocess_store_hits"))

    hits_before, stop = num_hits(), threading.Event()
    trouble = threading.Thread(target=spoil, args=(redis, stop))
    trouble.start()
    try:
        rng = random.Random(6)
        for round_number in range(20):
            jobs = [(rng.choice(servers), rng.choice(pictures)) for _ in range(60)]
            with ThreadPoolExecutor(4) as threads:
                answers = list(threads.map(lambda job: answer(*job), jobs))
            assert [wanted[picture] for _, picture in jobs] == answers
            if round_number >= 3 and num_hits() - hits_before > 20:  # it was the store that answered, between the blows
                break
        else:
            raise AssertionError("the store has hardly ever answered")
    finally:
        stop.set()
        trouble.join()
