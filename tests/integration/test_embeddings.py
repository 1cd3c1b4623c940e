"""Embeddings of real servers, one beside a language model and one alone, that share a Redis: what is done once, and for whom."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.integration.server import CLIP, ENGINE, Server, body, children_of, command_of, image, serving, text, wait_until
from tests.integration.web import Web
from tests.pictures import make_image
from tests.redis_server import running_redis

pytestmark = pytest.mark.slow

ANN, BOB = "sk-ann", "sk-bob"
OPTIONS = ("--redis-min-bytes", "0", "--preprocess-workers", "1", "--api-key", ANN, BOB)
COUNTS = ("preprocess_decodes", "preprocess_store_hits", "embedding_images", "embedding_cache_hits")


@pytest.fixture(scope="module")
def servers(tiny_model_dir: Path, tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """One with both models, and one with the embedding model alone."""
    with ExitStack() as stack:
        redis = stack.enter_context(running_redis(tmp_path_factory.mktemp("redis")))
        options = (*OPTIONS, "--redis-url", redis.url, "--embedding-model", tiny_clip)
        beside = ("--max-model-len", "512", "--allowed-media-domains", "127.0.0.1")
        folders = [tmp_path_factory.mktemp("server") for _ in range(2)]
        yield (
            stack.enter_context(serving(tiny_model_dir, folders[0], *options, *beside)),
            stack.enter_context(serving(None, folders[1], *options, "--runner", "pooling")),
        )


@pytest.fixture
def both(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture
def alone(servers: tuple[Server, Server]) -> Server:
    return servers[1]


def client(server: Server, key: str = ANN) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60.0)


def embed(server: Server, *inputs: Any, key: str = ANN, model: str = "tiny-clip") -> list[list[float]]:
    answer = client(server, key).embeddings.create(model=model, input=list(inputs))
    return [each.embedding for each in answer.data]


def counts(server: Server) -> list[float]:
    metrics = server.metrics()
    return [metrics[f"{name}_total"] for name in COUNTS]


def grown(server: Server, before: list[float]) -> list[float]:
    return [after - start for after, start in zip(counts(server), before, strict=True)]


def test_each_tenants_picture_is_decoded_and_encoded_once(both: Server) -> None:
    first, second = (image(make_image(80, 60, seed), "JPEG") for seed in (1, 2))
    before = counts(both)
    found = embed(both, first, "a cat", second, text("a cat"))
    assert grown(both, before) == [2, 0, 2, 0]
    assert all(math.isclose(sum(x * x for x in each), 1, abs_tol=1e-5) and len(each) == 32 for each in found)
    assert found[1] == found[3] and found[0] != found[2]
    assert embed(both, second, first) == [found[2], found[0]]
    assert grown(both, before) == [2, 0, 2, 2]
    assert embed(both, first, key=BOB) == [found[0]]
    assert grown(both, before) == [3, 0, 3, 2]


def test_servers_share_pictures_of_a_tenant_through_redis(both: Server, alone: Server) -> None:
    picture = image(make_image(81, 60, 3, "PNG"), "PNG")
    expected = embed(both, picture)
    wait_until(lambda: both.metrics()["preprocess_store_saves_total"] >= 1 and _is_kept(both), 10, "the picture is kept")
    before = counts(alone)
    assert embed(alone, picture, model="tiny") == expected and grown(alone, before) == [0, 1, 1, 0]
    assert embed(alone, picture, model="tiny", key=BOB) == expected and grown(alone, before) == [1, 1, 2, 0]


def _is_kept(server: Server) -> bool:
    metrics = server.metrics()
    return metrics["preprocess_store_saves_total"] == metrics["preprocess_decodes_total"]


def test_pictures_from_the_web_and_bad_ones(both: Server, web: Web) -> None:
    picture = make_image(82, 60, 4)
    web.files["/embedded.jpg"] = picture
    url = f"{web.url}/embedded.jpg"
    assert embed(both, image(url)) == embed(both, image(picture))
    message = [{"role": "user", "content": [image(url)]}]
    asked = {"model": "tiny-clip", "messages": message, "encoding_format": "float"}
    answer = both.http.post(f"{both.url}/v1/embeddings", json=asked, headers={"Authorization": f"Bearer {ANN}"})
    assert answer.json()["data"][0]["embedding"] == pytest.approx(embed(both, image(picture))[0], abs=1e-7)
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    for bad, code in (
        (image(picture[:-200]), "invalid_image"),
        (image("http://10.0.0.1/x.png"), "image_url_forbidden"),
        (image("file:///etc/passwd"), "image_url_forbidden"),
        ("cat " * 100, "context_length_exceeded"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            embed(both, "a cat", bad)
        assert (caught.value.code, caught.value.param) == (code, "input[1]")


def test_chats_and_embeddings_of_the_same_picture_beside_one_another(both: Server) -> None:
    picture = image(make_image(83, 60, 5))
    before = counts(both)
    chat = body([picture, text()])
    for _ in range(2):
        assert both.http.post(
            f"{both.url}/v1/chat/completions", json=chat, headers={"Authorization": f"Bearer {ANN}"}
        ).status_code == 200
        embed(both, picture)
    assert grown(both, before)[::2] == [2, 1]  # decoded once for each of the two models
    assert [card.id for card in client(both).models.list().data] == ["tiny", "tiny-clip"]


def test_the_embedding_model_alone(alone: Server) -> None:
    assert not [pid for pid in children_of(alone.process.pid) if ENGINE in command_of(pid)]
    assert [card.id for card in client(alone).models.list().data] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="--runner pooling"):
        client(alone).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert embed(alone, "x", model="tiny")


def refusal(server: Server) -> openai.InternalServerError | None:
    """Of a text's embedding; None: it was made."""
    try:
        embed(server, "a cat")
    except openai.InternalServerError as error:
        return error
    return None


def test_a_process_that_dies_is_replaced_and_chats_go_on(both: Server) -> None:
    picture = image(make_image(84, 60, 6))
    expected = embed(both, picture, "a cat")
    killed = both.pid_of(CLIP)
    before = both.metrics()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: refusal(both) is not None, 5, "its end is noticed")
    said = refusal(both)
    assert said is not None and (said.status_code, said.code) == (503, "embedder_unavailable")
    assert both.is_healthy()
    assert client(both).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1
    ).choices
    wait_until(lambda: refusal(both) is None, 60, "another is there")
    assert both.pid_of(CLIP) != killed
    assert embed(both, picture, "a cat") == expected
    after = both.metrics()
    growth = {name: after[name] - before[name] for name in after}
    once = ("embedding_process_deaths_total", "embedding_images_total", "preprocess_slab_hits_total")
    assert [growth[name] for name in once] == [1, 1, 1]
    assert growth["preprocess_decodes_total"] == 0 and after["preprocess_slab_pinned_bytes"] == 0


def test_they_end_when_they_are_told(servers: tuple[Server, Server]) -> None:
    """The last test of this file: the servers are gone after it."""
    for server in servers:
        family = children_of(server.process.pid)
        assert server.stop() == 0, server.log
        wait_until(lambda family=family: not any(CLIP in command_of(pid) for pid in family), 5, "the processes are gone")
