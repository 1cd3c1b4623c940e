"""What a request can have wrong, and what its sender is told: a clear 400 in OpenAI's shape. Nobody else notices."""

from __future__ import annotations

import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError

from tests.integration.errors import assert_is_clear_error
from tests.integration.server import Server, ask, body, image, text
from tests.integration.web import Web
from tests.pictures import encode, make_image, make_pil

pytestmark = pytest.mark.slow

def png_of_zeros(width: int, height: int) -> bytes:
    """A PNG of black pixels, a bit each: small as a file, whatever its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD = make_image(120, 90, seed=45)
DAMAGED = make_image(400, 300, seed=46)[:6000]  # its header is whole
BAD_PICTURES: dict[str, tuple[str | bytes, str]] = {
    "truncated body": (DAMAGED, "invalid_image"),
    "truncated header": (GOOD[:100], "invalid_image"),
    "truncated png": (make_image(100, 100, format="PNG")[:2000], "invalid_image"),
    "empty": (b"", "invalid_image"),
    "no image": (b"Hello, world! " * 50, "unsupported_image_format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image_format"),
    "tiff": (encode(make_pil(20, 20), "TIFF"), "unsupported_image_format"),
    "1x5000": (make_image(1, 5000, format="PNG"), "invalid_image"),
    "bomb": (png_of_zeros(13000, 13000), "image_too_large"),
    "no base64": ("data:image/png;base64,%%%", "invalid_image"),
    "no data": ("data:", "invalid_image"),
    "a path": ("/etc/hostname", "image_url_forbidden"),
    "a file url": ("file:///etc/hostname", "image_url_forbidden"),
    "another host": ("http://example.com/picture.jpg", "image_url_forbidden"),
    "the metadata service": ("http://169.254.169.254/latest", "image_url_forbidden"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused(server: Server, still_good: None, name: str, stream: bool) -> None:
    picture, code = BAD_PICTURES[name]
    start = time.monotonic()
    error = assert_is_clear_error(server.post(ask(picture, stream=stream)), code=code)
    assert error["param"] == "messages"
    assert time.monotonic() - start < 5.0


def test_a_fetched_picture_may_fail_too(server: Server, web: Web, still_good: None) -> None:
    web.files.update({"/damaged.jpg": DAMAGED, "/page.html": b"<html>no picture</html>"})
    assert_is_clear_error(server.post(ask(f"{web.url}/damaged.jpg")), code="invalid_image")
    assert_is_clear_error(server.post(ask(f"{web.url}/page.html")), code="unsupported_image_format")
    assert_is_clear_error(server.post(ask(f"{web.url}/missing.jpg")), code="image_fetch_failed")


def test_a_damaged_picture_harms_no_neighbour(server: Server, still_good: None) -> None:
    """In one batch with good ones, and as the second picture of a prompt; the client of the official library sees a 400."""
    expected = server.post(ask(GOOD, max_tokens=30)).json()["choices"]
    requests = [ask(GOOD, max_tokens=30), ask(DAMAGED), body([image(GOOD), image(DAMAGED), text()]), ask(GOOD, max_tokens=30)]
    requests += [request | {"stream": True} for request in requests[1:3]]
    with ThreadPoolExecutor(len(requests)) as threads:
        answers = list(threads.map(server.post, requests))
    assert [answer.status_code for answer in answers] == [200, 400, 400, 200, 400, 400]
    assert answers[0].json()["choices"] == answers[3].json()["choices"] == expected
    with server.client() as client, pytest.raises(BadRequestError) as failure:
        client.chat.completions.create(**ask(DAMAGED), stream=True)
    assert failure.value.code == "invalid_image"


WRONG_FIELDS: list[tuple[str, Any]] = [
    *(("temperature", value) for value in ("hot", -0.1, 2.1, [1], True)),
    *(("top_p", value) for value in (0, 1.5, "x")),
    *(("top_k", value) for value in (-2, 1.5, "x", 2**40)),
    *(("min_p", value) for value in (-0.1, 1.1, "x")),
    *(("n", value) for value in (0, -1, 17, 1.5, "2")),
    *(("seed", value) for value in ("x", 1.5, 2**70)),
    *(("max_tokens", value) for value in (0, -1, "x", 1.5, 2**70)),
    *(("max_completion_tokens", value) for value in (0, "x")),
    *(("stop", value) for value in (5, [1], "", ["x"] * 17, {})),
    *(("stop_token_ids", value) for value in ("x", [-1], ["x"], [10**7])),
    *(("presence_penalty", value) for value in (3, -3, "x")),
    *(("frequency_penalty", value) for value in (3, -3, "x")),
    *(("repetition_penalty", value) for value in (0, -1, 3, "x")),
    *(("logprobs", value) for value in (5, "yes")),
    *(("top_logprobs", value) for value in (-1, 21, "x", 3)),
    *(("ignore_eos", value) for value in ("no", 2)),
    *(("stream", value) for value in ("yes", 1)),
    *(("stream_options", value) for value in ({"include_usage": True}, "x", [])),
    *(("model", value) for value in (5, [])),
    *(("messages", value) for value in (None, [], "Hello", [5], [{}], [{"role": "user"}], {"role": "user", "content": "x"})),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": []}]),
    ("messages", [{"role": "user", "content": [{"type": "sound"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
    ("no_such_field", 1),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("response_format", {"type": "yaml"}),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
def test_a_wrong_field_is_named(server: Server, field: str, value: Any) -> None:
    error = assert_is_clear_error(server.post(body("Hello") | {field: value}))
    assert error["param"].startswith(field)
    assert field in error["message"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny"}', b"[" * 100_000, json.dumps(body("\ud800")).encode()]
)  # fmt: skip
def test_a_malformed_body_is_400(server: Server, still_good: None, data: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert_is_clear_error(server.http.post(f"{server.url}/v1/chat/completions", content=data, headers=headers))


def test_more_than_the_context_is_400(server: Server, still_good: None) -> None:
    assert_is_clear_error(server.post(body("word " * 5000)), code="context_length_exceeded")
    assert_is_clear_error(server.post(body("word " * 100, max_tokens=4090)), code="context_length_exceeded")
    pictures = [image(make_image(600, 600, seed=seed)) for seed in range(14)]
    assert_is_clear_error(server.post(body([*pictures, text("word " * 2500)])), code="context_length_exceeded")
    assert_is_clear_error(server.post(body([image(GOOD)] * 17)), code="too_many_images")


def test_unknown_models_and_routes_are_404(server: Server) -> None:
    answer = server.post(body("Hello") | {"model": "other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for path in ("/nothing", "/v1/nothing", "/v1/chat/completions/x"):
        answer = server.http.get(f"{server.url}{path}")
        assert answer.status_code == 404
        assert "error" in answer.json()
