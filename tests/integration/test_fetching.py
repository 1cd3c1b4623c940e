"""What a server reads for its clients, and what it does not: over HTTP, with a listener that notices every connection."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.errors import assert_is_clear_error
from tests.integration.server import ENGINE, Server, ask, body, image, serving, text, wait_until
from tests.integration.web import Web
from tests.pictures import data_url, make_image
from tests.preprocess.forged_urls import Trap, listening_trap

pytestmark = pytest.mark.slow

PICTURE = make_image(64, 48, seed=90)
FORGED_CODES = {"image_url_forbidden", "image_fetch_failed"}


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    with listening_trap() as listening:
        yield listening


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the guarded server may read, beside a secret."""
    media = tmp_path_factory.mktemp("files") / "media"
    (media / "inner").mkdir(parents=True)
    (media / "picture.jpg").write_bytes(PICTURE)
    (media / "inner" / "a b.jpg").write_bytes(PICTURE)
    (media.parent / "secret.jpg").write_bytes(PICTURE)
    (media / "out.jpg").symlink_to(media.parent / "secret.jpg")
    (media / "out").symlink_to(media.parent)
    (media / "in.jpg").symlink_to("picture.jpg")
    os.mkfifo(media / "pipe.jpg")
    return media


@pytest.fixture(scope="module")
def guarded(tiny_model_dir: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Fetches from public hosts only, as by default; and reads files of `media`."""
    options = ("--allowed-local-media-path", str(media))
    with serving(tiny_model_dir, tmp_path_factory.mktemp("guarded"), *options) as started:
        yield started


def all_of(server: Server, requests: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(server.post, requests))


def test_forged_urls_are_refused_and_nobody_is_called(guarded: Server, trap: Trap) -> None:
    """T-S1, T-E1."""
    before, engine = trap.num_caught, guarded.pid_of(ENGINE)
    urls = [url for url in trap.urls() if url]
    for url, answer in zip(urls, all_of(guarded, [ask(url) for url in urls]), strict=True):
        error = assert_is_clear_error(answer)
        assert error["code"] in FORGED_CODES, url
        assert str(trap.port) not in error["message"]
    assert trap.num_caught == before
    assert guarded.pid_of(ENGINE) == engine
    assert guarded.post(body("Hello", max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest", "http://127.0.0.2:{port}/x", "http://localhost:{port}/x", "http://[::ffff:10.0.0.1]/x",
        "http://2130706433:{port}/x", "//localhost:{port}/x", "file:///etc/passwd", "http://user@127.0.0.1:{port}/x",
    ],
)  # fmt: skip
def test_a_redirect_leads_nowhere_else(server: Server, web: Web, trap: Trap, target: str) -> None:
    """T-S3: from the one host that is allowed, away from it."""
    before = trap.num_caught
    web.headers["/away"] = {"Location": target.format(port=trap.port)}
    assert_is_clear_error(server.post(ask(f"{web.url}/away")), code="image_url_forbidden")
    assert trap.num_caught == before


def test_redirects_within_the_allowed_host_have_an_end(server: Server, web: Web) -> None:
    """T-S3."""
    web.files["/hop/0"] = PICTURE
    web.headers |= {f"/hop/{number}": {"Location": f"/hop/{number - 1}"} for number in range(1, 12)}
    assert server.post(ask(f"{web.url}/hop/5", max_tokens=1)).status_code == 200
    for number in (6, 11):
        assert_is_clear_error(server.post(ask(f"{web.url}/hop/{number}")), code="image_fetch_failed")


def test_a_compressed_answer_is_not_unpacked(server: Server, web: Web) -> None:
    """T-S7: 1000:1, said and unsaid."""
    web.files["/bomb"] = web.files["/silent-bomb"] = gzip.compress(bytes(100 << 20))
    web.headers["/bomb"] = {"Content-Encoding": "gzip"}
    before = server.memory_mib()
    assert_is_clear_error(server.post(ask(f"{web.url}/bomb")), code="image_fetch_failed")
    assert_is_clear_error(server.post(ask(f"{web.url}/silent-bomb")), code="unsupported_image_format")
    assert server.memory_mib() - before < 50


def refused_requests(picture: str) -> dict[str, tuple[bytes | dict[str, Any], int]]:
    """By name: a request with ten pictures of this URL that is refused whatever they are, and with what status."""
    pictures = [image(picture)] * 10
    good = body([*pictures, text()])

    def with_part(part: dict[str, Any], first: bool = False) -> dict[str, Any]:
        return body([part, *pictures, text()] if first else [*pictures, part, text()])

    large = make_image(600, 600, seed=91)
    return {
        "cut off json": (json.dumps(good).encode()[:-2], 400),
        "not utf-8": (json.dumps(good).encode() + b"\xff", 400),
        "another model": (good | {"model": "other"}, 404),
        "an unknown field": (good | {"uuid": "x"}, 400),
        "an unknown field of a part": (with_part({"type": "image_url", "image_url": {"url": picture, "uuid": "x"}}), 400),
        "a wrong type": (good | {"temperature": "hot"}, 400),
        "out of range": (good | {"top_p": 1.5}, 400),
        "not a number": (json.dumps(good | {"temperature": float("nan")}).encode(), 400),
        "too many answers": (good | {"n": 17}, 400),
        "an unknown token": (good | {"stop_token_ids": [2_000_000_000]}, 400),
        "a function": (good | {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400),
        "options of no stream": (good | {"stream_options": {"include_usage": True}}, 400),
        "an unknown role": (good | {"messages": [*good["messages"], {"role": "wizard", "content": "x"}]}, 400),
        "half a surrogate pair": (json.dumps(body([*pictures, text("\ud800")])).encode(), 400),
        "too many pictures": (body([image(picture)] * 17), 400),
        "too long a text": (body([*pictures, text("word " * 5000)]), 400),
        "far too long a text": (body([*pictures, text("word " * 500_000)]), 400),
        "too long an answer": (good | {"max_tokens": 5000}, 400),
        "too long together": (body([*pictures, text("word " * 100)], max_tokens=4080), 400),
        "too long with the pictures at hand": (body([*pictures[:4], *[image(large)] * 10, text("word " * 2500)]), 400),
        "a bad data url": (with_part(image("data:image/png;base64,%%%")), 400),
        "a bad data url first": (with_part(image("data:image/png;base64,%%%"), first=True), 400),
        "no picture in a data url": (with_part(image(data_url(b"no picture"))), 400),
        "damaged header in a data url": (with_part(image(make_image(50, 50)[:30])), 400),
        "a forbidden host": (with_part(image("http://elsewhere.example/x")), 400),
        "a forbidden address": (with_part(image("http://169.254.169.254/latest")), 400),
        "a forbidden scheme": (with_part(image("gopher://127.0.0.1/x")), 400),
        "a file": (with_part(image("file:///etc/passwd")), 400),
        "a path": (with_part(image("/etc/passwd")), 400),
        "credentials": (with_part(image("http://user:password@127.0.0.1/x")), 400),
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", refused_requests(""))
def test_nothing_is_fetched_for_a_request_that_is_refused(server: Server, trap: Trap, name: str, stream: bool) -> None:
    """T-S6: no connection is made for any of its pictures, though their host is an allowed one."""
    request, status = refused_requests(f"http://127.0.0.1:{trap.port}/x")[name]
    before = trap.num_caught
    if isinstance(request, bytes):
        headers = {"Content-Type": "application/json"}
        answer = server.http.post(f"{server.url}/v1/chat/completions", content=request, headers=headers)
    else:
        answer = server.post(request | ({"stream": True} if stream and name != "options of no stream" else {}))
    assert_is_clear_error(answer, status)
    assert trap.num_caught == before


def test_the_trap_catches_what_is_fetched(server: Server, trap: Trap) -> None:
    """Or the tests above would say nothing."""
    before = trap.num_caught
    assert_is_clear_error(server.post(ask(f"http://127.0.0.1:{trap.port}/x")), code="image_fetch_failed")
    wait_until(lambda: trap.num_caught == before + 1, 5, "somebody called")


def test_an_allowed_host_is_allowed_by_its_exact_name(server: Server, web: Web, trap: Trap) -> None:
    """`--allowed-media-domains 127.0.0.1`: other spellings of the same address, and names of it, are other hosts."""
    web.files["/allowed.jpg"] = PICTURE
    assert server.post(ask(f"{web.url}/allowed.jpg", max_tokens=1)).status_code == 200
    before = trap.num_caught
    for host in ("localhost", "127.1", "2130706433", "a.127.0.0.1", "127.0.0.1.example", "[::ffff:127.0.0.1]", "127.0.0.2"):
        assert_is_clear_error(server.post(ask(f"http://{host}:{trap.port}/x")), code="image_url_forbidden")
    assert trap.num_caught == before


# ---- files --------------------------------------------------------------------------------------------------------------


def test_files_of_the_allowed_directory(guarded: Server, media: Path) -> None:
    expected = guarded.post(ask(PICTURE, logprobs=True)).json()["choices"]
    for name in ("picture.jpg", "in.jpg", "inner/a%20b.jpg", "inner/../picture.jpg"):
        answer = guarded.post(ask(f"file://{media}/{name}", logprobs=True))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == expected


def test_files_elsewhere_are_refused(guarded: Server, media: Path) -> None:
    engine = guarded.pid_of(ENGINE)
    outside = [
        "file:///etc/passwd", f"file://{media}/../secret.jpg", f"file://{media}/%2e%2e/secret.jpg", f"file://{media}/..%2fsecret.jpg",
        f"file://{media}/out.jpg", f"file://{media}/out/secret.jpg", f"file://{media.parent}/secret.jpg", f"file://{media}",
        f"file://localhost/{media}/../secret.jpg", f"file://example.com{media}/picture.jpg", f"file://{media}/picture.jpg%00",
        f"file://{media}/picture.jpg?x", "file:///dev/zero", "file:///proc/self/environ", f"{media}/picture.jpg",
    ]  # fmt: skip
    for url, answer in zip(outside, all_of(guarded, [ask(url) for url in outside]), strict=True):
        error = assert_is_clear_error(answer, code="image_url_forbidden")
        assert str(media.parent) not in error["message"], url
    inside = [f"file://{media}/{name}" for name in ("nothing.jpg", "inner", "pipe.jpg", "picture.jpg/x")]
    for answer in all_of(guarded, [ask(url) for url in inside]):
        assert_is_clear_error(answer, code="image_fetch_failed")
    assert guarded.pid_of(ENGINE) == engine
    assert guarded.post(ask(f"file://{media}/picture.jpg", max_tokens=1)).status_code == 200


def test_a_file_has_the_same_limits(guarded: Server, media: Path) -> None:
    (media / "large.jpg").write_bytes(PICTURE + random.Random(1).randbytes(20 << 20))
    (media / "page.jpg").write_bytes(b"<html></html>")
    assert_is_clear_error(guarded.post(ask(f"file://{media}/large.jpg")), code="image_too_large")
    assert_is_clear_error(guarded.post(ask(f"file://{media}/page.jpg")), code="unsupported_image_format")


def test_without_the_directory_there_are_no_files(server: Server, media: Path) -> None:
    for name in ("picture.jpg", "nothing.jpg"):
        error = assert_is_clear_error(server.post(ask(f"file://{media}/{name}")), code="image_url_forbidden")
        assert error["message"] == "file: URLs are not allowed here"
