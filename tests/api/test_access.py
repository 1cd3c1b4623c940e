"""Who may ask, and as whom: keys, tenants, pages of other origins, paths behind a proxy."""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmv1.api.access import ApiKeys, salt_of
from mmv1.api.server import create_app, serve
from mmv1.api.settings import ServerSettings
from mmv1.errors import ConfigError
from tests.api.fake_llm import MODEL, FakeLLM, body

CHAT = "/v1/chat/completions"
KEYS = ("sk-one", "sk-two")


def ask(llm: FakeLLM, settings: ServerSettings, use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    """What `use` returns of a client of such a server, without a socket."""

    async def main() -> Any:
        transport = httpx.ASGITransport(create_app(llm, settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await use(client)

    return asyncio.run(main())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


WRONG = ["", "Bearer ", "Bearer sk-on", "Bearer sk-onee", "Bearer SK-ONE", "Basic sk-one", "sk-one", "Bearer sk-one,sk-two"]


@pytest.mark.parametrize("given", WRONG)
def test_without_a_key_nothing_is_done(llm: FakeLLM, given: str) -> None:
    headers = {"Authorization": given} if given else {}
    reply = ask(llm, ServerSettings(api_keys=KEYS), lambda client: client.post(CHAT, json=body(), headers=headers))
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert not llm.asked


@pytest.mark.parametrize("given", ["Bearer sk-one", "bearer sk-two", "Bearer  sk-two "])
def test_each_key_opens(llm: FakeLLM, given: str) -> None:
    headers = {"Authorization": given}
    reply = ask(llm, ServerSettings(api_keys=KEYS), lambda client: client.post(CHAT, json=body(), headers=headers))
    assert reply.status_code == 200


def test_every_route_but_the_open_ones_needs_a_key(llm: FakeLLM) -> None:
    """Also those that nobody has thought of here, and paths that there are not."""
    settings = ServerSettings(api_keys=KEYS)

    async def use(client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        paths = {*document["paths"], "/v1/models/", "/v1", "//health", "/health/", "/healthz", "/docs/x", "/no"}
        openly = {path for path in paths if await status(client, path) != 401}
        assert openly == paths & {"/", "/health", "/metrics", "/ping", "/version"}
        for path in ("/health", "/metrics", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/v1/models", headers=bearer("sk-one"))).json()["data"][0]["id"] == MODEL
        # What routes is the request line: no header makes another path of it.
        disguise = {"Host": "test/health?", "X-Forwarded-Prefix": "/health"}
        assert (await client.get("/v1/models", headers=disguise)).status_code == 401

    async def status(client: httpx.AsyncClient, path: str) -> int:
        return (await client.get(httpx.URL("http://test", raw_path=path.encode()))).status_code

    ask(llm, settings, use)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with all, by a comparison that does not stop early, and of digests: not even their lengths matter."""
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def spying(a: str, b: str) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr("mmv1.api.access.hmac.compare_digest", spying)
    keys = ApiKeys(None, KEYS)  # type: ignore[arg-type]
    for given in (b"sk-one", b"sk-two", b"x", b"x" * 10_000):
        compared.clear()
        keys._tenant(b"Bearer " + given)
        assert len(compared) == len(KEYS)
        assert {len(side) for pair in compared for side in pair} == {64}


@pytest.mark.parametrize(("path", "question"), [(CHAT, body()), ("/v1/completions", {"model": MODEL, "prompt": "hi"})])
def test_a_tenants_name_is_in_the_cache_salt_of_all_it_asks(llm: FakeLLM, path: str, question: dict[str, object]) -> None:
    settings = ServerSettings(api_keys=KEYS)

    async def use(client: httpx.AsyncClient) -> list[object]:
        for key, salt in (("sk-one", None), ("sk-two", None), ("sk-one", "s"), ("sk-two", "s"), ("sk-one", None)):
            options = {} if salt is None else {"cache_salt": salt}
            assert (await client.post(path, json={**question, **options}, headers=bearer(key))).status_code == 200
        return [options["cache_salt"] for _, _, options in llm.asked]

    one, two, one_s, two_s, again = ask(llm, settings, use)
    assert one == again
    assert len({one, two, one_s, two_s}) == 4
    assert all(key not in salt for key in KEYS for salt in (one, two, one_s, two_s))


def test_without_keys_the_salt_is_the_clients_own() -> None:
    assert [salt_of({}, None), salt_of({}, "s")] == ["", "s"]


@pytest.mark.parametrize("path", ["/gate", ""])
def test_a_root_path_may_be_taken_off_by_the_proxy_or_not(llm: FakeLLM, path: str) -> None:
    settings = ServerSettings(api_keys=KEYS, root_path="/gate")

    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.post(f"{path}{CHAT}", json=body(), headers=bearer("sk-one"))).status_code == 200
        assert (await client.get(f"{path}/v1/models", headers=bearer("sk-one"))).status_code == 200
        assert (await client.get(f"{path}/v1/models")).status_code == 401
        assert (await client.get(f"{path}/health")).status_code == 200
        assert "/gate/openapi.json" in (await client.get(f"{path}/docs")).text
        assert (await client.get(f"{path}/openapi.json")).json()["servers"] == [{"url": "/gate"}]

    ask(llm, settings, use)


ORIGIN = "https://page.example.org"


def test_a_page_of_an_allowed_origin_may_read_answers_and_refusals(llm: FakeLLM) -> None:
    settings = ServerSettings(api_keys=KEYS, allowed_origins=(ORIGIN,), allowed_methods=("GET", "POST"), max_request_bytes=1000)

    async def use(client: httpx.AsyncClient) -> None:
        asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = await client.options(CHAT, headers=asks)  # which no browser sends a key with
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for reply in (
            await client.post(CHAT, json=body(stream=True), headers={**bearer("sk-one"), "Origin": ORIGIN}),
            await client.post(CHAT, json=body(user="x" * 1000), headers={**bearer("sk-one"), "Origin": ORIGIN}),
            await client.post(CHAT, json=body(), headers={"Origin": ORIGIN}),
        ):
            assert reply.headers["access-control-allow-origin"] == ORIGIN, reply.text
            assert "access-control-allow-credentials" not in reply.headers
        asks["Origin"] = "https://other.example.org"
        assert (await client.options(CHAT, headers=asks)).status_code == 400
        other = await client.post(CHAT, json=body(), headers={**bearer("sk-one"), "Origin": asks["Origin"]})
        assert "access-control-allow-origin" not in other.headers

    ask(llm, settings, use)


def test_unasked_no_page_of_another_origin_may_read_anything(llm: FakeLLM) -> None:
    asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    preflight = ask(llm, ServerSettings(), lambda client: client.options(CHAT, headers=asks))
    assert preflight.status_code == 405
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_https(llm: FakeLLM) -> None:
    """With the certificate of the tests of downloads, which is not of this name."""
    pem = str(Path(__file__).parents[1] / "preprocess" / "tls" / "server.pem")

    async def main() -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = ServerSettings(ssl_keyfile=pem, ssl_certfile=pem)
        server = asyncio.ensure_future(serve(llm, listener, settings=settings))
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, verify=False, timeout=20) as client:
            assert (await client.post(CHAT, json=body())).status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(server, 20) == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_keys": ("",)}, "API key"),
        ({"api_keys": ("two words",)}, "API key"),
        ({"api_keys": ("schlüssel",)}, "API key"),
        ({"root_path": "gate"}, "--root-path gate"),
        ({"root_path": "/gate/"}, "--root-path /gate/"),
        ({"max_request_bytes": 0}, "--max-request-bytes 0"),
        ({"max_queued_requests": 0}, "--max-queued-requests 0"),
        ({"max_queued_requests_per_key": 3}, "--api-key"),
        ({"shutdown_timeout_s": -1.0}, "--shutdown-timeout -1"),
        ({"shutdown_timeout_s": float("nan")}, "--shutdown-timeout nan"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-certfile"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerSettings(**settings)
