"""Fetching under the policy: what is refused is refused before anything is dialled; what is allowed is bounded."""

import asyncio
import base64
import contextlib
import gzip
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import httpx
import pytest

from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.fetch import ImageFetcher, is_public, parse_data_url
from mmv1.preprocess.media import ImageLimits
from mmv1.preprocess.timings import StageTimings
from tests.pictures import make_image
from tests.preprocess.forged_urls import listening_trap
from tests.preprocess.processes import wait_until

LIMITS = ImageLimits(max_encoded_bytes=100_000, max_pixels=1 << 30, max_side=1 << 20)
PICTURE = make_image(64, 48)
BOMB = gzip.compress(bytes(10 << 20), mtime=0)


class _Handler(BaseHTTPRequestHandler):
    """A picture, and every way to misbehave."""

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        name, _, argument = self.path[1:].partition("/")
        body, status, headers = PICTURE, 200, {}
        if name == "status":
            status = int(argument)
        elif name == "redirect":
            status, headers, body = 302, {"Location": argument}, b""
        elif name == "loop":
            status, headers, body = 302, {"Location": f"/loop/{int(argument) - 1}" if int(argument) else "/picture"}, b""
        elif name == "big":
            body = bytes(200_000)
        elif name == "compressed":
            headers = {"Content-Encoding": argument}
        elif name == "bomb":
            body, headers = BOMB, {"Content-Encoding": unquote(argument)} if argument else {}
        elif name == "endless":
            self.endless(argument)
            return
        elif name == "headers":
            self.send_response(200)
            with contextlib.suppress(ConnectionError):
                for _ in range(100_000):
                    self.wfile.write(b"X: " + bytes(1000).replace(b"\0", b"x") + b"\r\n")
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if name == "cookie":
            self.send_header("Set-Cookie", "session=of-one-user; Path=/")
        if name != "stream":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if name == "slow":
                self.wfile.write(body[:10])
                self.wfile.flush()
                self.server.released.wait(20)
            elif name == "stream":
                for _ in range(100):
                    self.wfile.write(bytes(50_000))
            else:
                self.wfile.write(body)

    def endless(self, kind):
        """10 GB, or as many of them as somebody takes."""
        self.send_response(200)
        self.close_connection = True
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif kind != "none":
            self.send_header("Content-Length", "99000" if kind == "lying" else str(10 << 30))
        self.end_headers()
        sent, piece = 0, bytes(1 << 20)
        if kind == "chunked":
            piece = b"%x\r\n" % len(piece) + piece + b"\r\n"
        with contextlib.suppress(ConnectionError):
            while sent < 10 << 30:
                self.wfile.write(piece)
                sent += len(piece)
        self.server.sent.append(sent)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.seen, server.sent, server.released = [], [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(url, **options):
    async def run():
        fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), **options)
        try:
            return await fetcher.fetch(await fetcher.look_up(url)), fetcher
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(url, **options):
    with pytest.raises(ImageError) as error:
        fetch(url, **options)
    message = error.value.message
    assert "0x" not in message and "127.0.0.1" not in message and "localhost" not in message
    return error.value.code


def at(server, path):
    return f"http://127.0.0.1:{server.server_port}/{path}"


NAMED = {"allowed_domains": ["127.0.0.1"]}


def test_a_picture_from_a_named_host(server):
    body, fetcher = fetch(at(server, "picture?a=1#fragment"), **NAMED)
    assert body == PICTURE
    assert (fetcher.num_fetches, fetcher.fetched_bytes) == (1, len(PICTURE))
    path, headers = server.seen[-1]
    assert path == "/picture?a=1"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}" and headers["Accept-Encoding"] == "identity"


def test_the_name_stays_in_the_host_header_and_the_checked_address_is_dialled(server):
    lookups = []

    async def resolve(host, port):
        lookups.append((host, port))
        return ["127.0.0.1"]

    url = f"http://pictures.example:{server.server_port}/picture"
    body, _ = fetch(url, allowed_domains=["Pictures.Example."], resolve=resolve)
    assert body == PICTURE and lookups == [("pictures.example", server.server_port)]
    assert server.seen[-1][1]["Host"] == f"pictures.example:{server.server_port}"


def test_the_next_address_is_tried(server):
    async def resolve(host, port):
        return ["127.0.0.2", "127.0.0.1"]  # nothing listens on the first: the server is bound to one address

    url = f"http://pictures.example:{server.server_port}/picture"
    body, _ = fetch(url, allowed_domains=["pictures.example"], resolve=resolve)
    assert body == PICTURE


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "localhost", "LOCALHOST.", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "10.0.0.1", "172.16.3.4", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "[fe80::1]", "[fc00::1]",
        "[ff02::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "[::7f00:1]",
        "１２７.0.0.1",
    ],
)  # fmt: skip
def test_private_hosts_are_refused_before_any_connection(server, host):
    before = len(server.seen)
    assert refusal(f"http://{host}:{server.server_port}/picture") in ("image_url_forbidden", "image_fetch_failed")
    assert len(server.seen) == before


def test_one_private_address_condemns_a_host(server):
    async def resolve(host, port):
        return ["8.8.8.8", "127.0.0.1"]

    before = len(server.seen)
    assert refusal(f"http://rebind.example:{server.server_port}/picture", resolve=resolve) == "image_url_forbidden"
    assert len(server.seen) == before


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "not an address", "fe80::1%eth0", "::ffff:10.0.0.1", "192.0.0.1", "0.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::7f00:1", "224.0.0.1", "ff0e::1", "240.0.0.1",
    ],
)  # fmt: skip
def test_other_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.com/x", "gopher://example.com", "/etc/passwd", "etc/passwd", "", "http://", "http:///x",
        "http://user@example.com/", "http://user:pass@example.com/", "http://example.com\\@127.0.0.1/", "http://exa mple.com/",
        "http://example.com/\r\nX: y", "http://example.com:99999/", "http://example.com:0/", "http://[::1", "javascript:alert(1)",
        "http://127.0.0.1:80@example.com/", "http://example.com/" + "a" * 9000, "blob:http://example.com/x", "http://\0example.com/",
    ],
)  # fmt: skip
def test_other_urls_are_refused(url):
    assert refusal(url) == "image_url_forbidden"


@pytest.mark.parametrize("url", ["http://other.example/", "http://8.8.8.8/", "http://a.pictures.example/", "http://localhost/"])
def test_the_allow_list_is_all_there_is(url):
    assert refusal(url, allowed_domains=["pictures.example"]) == "image_url_forbidden"


def test_redirects_are_followed_and_counted(server):
    assert fetch(at(server, "redirect//picture"), **NAMED)[0] == PICTURE
    assert fetch(at(server, "loop/4"), **NAMED)[0] == PICTURE
    assert refusal(at(server, "loop/5"), **NAMED) == "image_fetch_failed"


@pytest.mark.parametrize("target", ["http://localhost/x", "http://8.8.8.8/x", "file:///etc/passwd", "//localhost/x", "http://a@127.0.0.1/"])
def test_every_hop_is_checked_against_the_allow_list(server, target):
    assert refusal(at(server, f"redirect/{target}"), **NAMED) == "image_url_forbidden"


def test_a_redirect_to_a_private_address_is_refused(server, monkeypatch):
    """The first hop passes as public; the second is checked anew."""
    import mmv1.preprocess.fetch as module

    first = []
    monkeypatch.setattr(module, "is_public", lambda address: not first and (first.append(address) or True))
    before = len(server.seen)
    assert refusal(at(server, f"redirect/{at(server, 'picture')}")) == "image_url_forbidden"
    assert len(server.seen) == before + 1


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("status/404", "image_fetch_failed"), ("status/500", "image_fetch_failed"), ("status/204", "image_fetch_failed"),
        ("big", "image_too_large"), ("stream", "image_too_large"), ("compressed/gzip", "image_fetch_failed"),
        ("compressed/br", "image_fetch_failed"),
    ],
)  # fmt: skip
def test_bad_answers(server, path, code):
    assert refusal(at(server, path), **NAMED) == code


def test_a_slow_server(server):
    assert refusal(at(server, "slow"), timeout_s=0.3, **NAMED) == "image_fetch_timeout"


def test_no_cookie_is_kept(server):
    """Hosts are dialled by address: a cookie of one host would go to others, and one user's to another's host."""

    async def resolve(host, port):
        return ["127.0.0.1"]

    async def run():
        options = {"allowed_domains": ["a.example", "b.example"], "resolve": resolve}
        fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), **options)
        for host in ("a.example", "a.example", "b.example"):
            await fetcher.fetch(await fetcher.look_up(f"http://{host}:{server.server_port}/cookie"))
        await fetcher.close()

    asyncio.run(run())
    assert [headers.get("Cookie") for _, headers in server.seen[-3:]] == [None] * 3


def test_the_wait_for_a_turn_has_an_end(server):
    """Hosts that hang take every turn; who comes next is told so in time, and not after all of them."""

    async def run():
        fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), timeout_s=0.5, **NAMED)
        target = await fetcher.look_up(at(server, "slow"))
        try:
            async with asyncio.timeout(1.4):  # three full rounds of 64 would take 1.5 s
                return await asyncio.gather(*(fetcher.fetch(target) for _ in range(200)), return_exceptions=True)
        finally:
            await fetcher.close()

    assert {error.code for error in asyncio.run(run())} == {"image_fetch_timeout"}


def test_look_ups_that_hang_have_an_end_and_hold_up_nothing_else(server, monkeypatch):
    """They are calls that cannot be cancelled; the threads they block are not those that other work waits for."""
    blocked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: blocked.wait(20))

    async def run():
        fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), timeout_s=0.3)
        lookups = [fetcher.look_up(f"http://{n}.example/x") for n in range(40)]
        failed, other = await asyncio.gather(asyncio.gather(*lookups, return_exceptions=True), asyncio.to_thread(lambda: "done"))
        await fetcher.close()
        return {error.code for error in failed}, other

    async def bounded():
        async with asyncio.timeout(5):
            return await run()

    try:
        assert asyncio.run(bounded()) == ({"image_fetch_timeout"}, "done")
    finally:
        blocked.set()


def test_the_name_is_in_the_tls_handshake():
    """Nothing but a socket that reads the client's first words and hangs up."""

    async def resolve(host, port):
        return ["127.0.0.1"]

    hello = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                hello.append(connection.recv(16384))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"https://pictures.example:{listener.getsockname()[1]}/picture"
        assert refusal(url, allowed_domains=["pictures.example"], resolve=resolve) == "image_fetch_failed"
        thread.join(10)
    assert b"pictures.example" in hello[0]


def test_nobody_listens(server):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as closed:
        port = closed.server_port
    assert refusal(f"http://127.0.0.1:{port}/picture", **NAMED) == "image_fetch_failed"


def test_a_name_that_does_not_exist():
    async def resolve(host, port):
        raise OSError("no such name")

    assert refusal("http://nothing.example/x", resolve=resolve) == "image_fetch_failed"


def test_no_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert fetch(at(server, "picture"), **NAMED)[0] == PICTURE

# ---- requests forged through this server --------------------------------------------------------------------------------


def test_forged_urls_reach_nobody(monkeypatch):
    """T-S1: every spelling is refused, and no address is ever connected to. That the trap works is seen first."""
    with listening_trap() as trap:
        assert len(trap.urls()) >= 60
        for host in ("127.0.0.1", "localhost"):
            assert refusal(f"http://{host}:{trap.port}/x", allowed_domains=[host]) == "image_fetch_failed"
        wait_until(lambda: trap.num_caught >= 2)
        before = trap.num_caught

        async def codes():
            fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings())
            for url in trap.urls():
                with pytest.raises(ImageError) as error:
                    await fetcher.fetch(await fetcher.look_up(url))
                yield url, error.value.code
            await fetcher.close()

        async def unresolved():
            return [url async for url, code in codes() if code != "image_url_forbidden"]

        assert len(asyncio.run(unresolved())) <= 10  # spellings that this system's look-up does not know
        assert trap.num_caught == before


@pytest.mark.parametrize("name", ["127.0.0.1.nip.io", "localtest.me", "a.metadata.example", "xn--nxasmq6b.example"])
def test_names_of_private_addresses_are_refused(server, name):
    """T-S1: however harmless the name sounds."""

    async def resolve(host, port):
        return {"a.metadata.example": ["169.254.169.254"], "localtest.me": ["::1"]}.get(host, ["127.0.0.1"])

    before = len(server.seen)
    assert refusal(f"http://{name}:{server.server_port}/picture", resolve=resolve) == "image_url_forbidden"
    assert len(server.seen) == before


def picture_answer():
    return httpx.Response(200, stream=httpx.ByteStream(PICTURE))


def recorded_requests(answer=lambda request: picture_answer(), resolve=None):
    """A fetcher that dials nobody: what it would have sent, and to which address; and what it asked the name server."""
    requests, lookups = [], []

    def handle(request):
        requests.append(request)
        return answer(request)

    async def ask(host, port):
        lookups.append((host, port))
        return ["93.184.215.14"] if resolve is None else resolve(host)

    fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), resolve=ask)
    fetcher._client._transport = httpx.MockTransport(handle)
    fetcher._client._mounts = {}
    return fetcher, requests, lookups


def test_the_checked_host_is_the_requested_one_for_any_url():
    """T-S2: 10,000 URLs put together from what parsers disagree about. Of each that passes, the host that was looked up, the one
    in the Host header and the one that the standard library reads are the same, and the checked address is dialled."""
    pieces = [
        "http://", "https://", "http:/", "http:", "//", "/", "\\", "@", ":", "?", "#", ".", "..", "%00", "%2f", "%40", "%5c",
        "\t", "\n", "\r", " ", "\x00", "[", "]", "::1", "127.0.0.1", "example.com", "a.example", "b.example:81", "0x7f.1",
        "user:pw", "ｅxample.com", "ß.example", "xn--ls8h.example", "。", ";", "&", "x", "80", "0", "65536",
        "\u200b", "\ufeff", "\u2028",
        "é", "%E9", "*", "{", "|",
    ]  # fmt: skip
    rng = random.Random(7)
    fetcher, requests, lookups = recorded_requests()
    passed = 0

    async def run():
        nonlocal passed
        for number in range(10_000):
            start = "http://" if number % 4 else rng.choice(("https://", "http:", "HTTP://"))
            first = rng.choice(("example.com", "a.example", "b.example:81", "")) if number % 2 else ""
            url = start + first + "".join(rng.choices(pieces, k=rng.randint(1, 5)))
            try:
                body = await fetcher.fetch(await fetcher.look_up(url))
            except ImageError as error:
                assert error.code == "image_url_forbidden", url
                continue
            passed += 1
            assert body == PICTURE
            request, (host, port) = requests[-1], lookups[-1]
            assert request.url.host == "93.184.215.14", url
            sent = urlsplit(f"//{request.headers['Host']}")
            assert (sent.hostname, sent.port or (443 if request.url.scheme == "https" else 80)) == (host, port), url
            assert request.extensions.get("sni_hostname") == (host if request.url.scheme == "https" else None)
            read_otherwise = urlsplit(url)
            assert not read_otherwise.username, url
            assert httpx.URL(scheme="http", host=unquote(read_otherwise.hostname or "")).raw_host.decode() == host, url
        await fetcher.close()

    asyncio.run(run())
    assert passed > 1000 and len(requests) == len(lookups) == passed


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest", "http://127.0.0.1/x", "http://127.0.0.1:6379/x", "http://[::ffff:10.0.0.1]/x", "http://[::1]/x",
        "http://2130706433/x", "//10.0.0.1/x", "file:///etc/passwd", "ftp://93.184.215.14/x", "data:image/png;base64,AAAA",
        "http://user@93.184.215.14/x", "http://93.184.215.14:99999/x", "\\\\10.0.0.1\\x", "http:\\\\10.0.0.1/x",
    ],
)  # fmt: skip
def test_a_redirect_is_checked_like_the_first_url(target):
    """T-S3: nothing after the first request leaves."""

    def resolve(host):
        if host == "2130706433":
            return ["127.0.0.1"]
        return [host] if host[0].isdigit() or ":" in host else ["93.184.215.14"]

    redirect = httpx.Response(302, headers={"Location": target})
    fetcher, requests, _ = recorded_requests(lambda request: redirect, resolve)

    async def run():
        try:
            return await fetcher.fetch(await fetcher.look_up("http://public.example/x"))
        finally:
            await fetcher.close()

    with pytest.raises(ImageError) as error:
        asyncio.run(run())
    assert error.value.code in ("image_url_forbidden", "image_fetch_failed")  # the latter: it is no URL at all
    assert len(requests) == 1


def test_a_redirect_to_another_port_of_a_public_host_is_followed_and_a_loop_has_an_end():
    """T-S3: the port belongs to nobody's policy; the number of hops does."""

    def answer(request):
        hop = int(request.url.path[1:])
        if hop == 3:
            return picture_answer()
        return httpx.Response(307, headers={"Location": f"https://{hop}.example:{8000 + hop}/{hop + 1}"})

    async def run(path):
        fetcher, requests, lookups = recorded_requests(answer)
        try:
            return await fetcher.fetch(await fetcher.look_up(f"http://public.example{path}")), requests, lookups
        finally:
            await fetcher.close()

    body, requests, lookups = asyncio.run(run("/0"))
    assert body == PICTURE
    assert lookups == [("public.example", 80), *((f"{hop}.example", 8000 + hop) for hop in range(3))]
    assert [request.url.port for request in requests] == [None, 8000, 8001, 8002]
    with pytest.raises(ImageError, match="more than 5 times") as error:
        asyncio.run(run("/-8"))  # eleven hops from the end
    assert error.value.code == "image_fetch_failed"


def test_a_name_that_changes_its_address_gains_nothing():
    """T-S4: public when checked, private ever after. The address that was checked is dialled; at a redirect to the same name, the
    name is looked up and judged again."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"], ["127.0.0.1"]])
    redirect = httpx.Response(302, headers={"Location": "/again"})

    async def run(answer):
        fetcher, requests, lookups = recorded_requests(answer, lambda host: next(answers))
        target = await fetcher.look_up("http://rebind.example/x")
        try:
            await fetcher.fetch(target)
        finally:
            await fetcher.close()
            seen.append(([request.url.host for request in requests], len(lookups)))

    seen = []
    asyncio.run(run(lambda request: picture_answer()))
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    with pytest.raises(ImageError) as error:
        asyncio.run(run(lambda request: redirect))
    assert error.value.code == "image_url_forbidden"
    assert seen == [(["93.184.215.14"], 1), (["93.184.215.14"], 2)]


@pytest.mark.parametrize(
    "domain", ["http://a.example", "a.example/x", "*.a.example", "a.example:80", "a b", "", "user@a.example", "::1"]
)
def test_a_domain_that_is_no_host_name_is_told_at_start(domain):
    with pytest.raises(ConfigError, match="--allowed-media-domains"):
        ImageFetcher(limits=LIMITS, timings=StageTimings(), allowed_domains=[domain])


@pytest.mark.parametrize(
    ("domain", "host"),
    [("bücher.example", "xn--bcher-kva.example"), ("xn--bcher-kva.example", "BÜCHER.example."), ("[::1]", "[0:0::1]")],
)
def test_a_host_is_the_same_in_every_spelling(domain, host):
    fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), allowed_domains=[domain], resolve=always_local)
    try:
        assert asyncio.run(fetcher.look_up(f"http://{host}/x")).addresses == ["127.0.0.1"]
    except ImageError:
        assert domain == "[::1]"  # another text of the same address is another name


async def always_local(host, port):
    return ["127.0.0.1"]


# ---- limits while reading -----------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """The number of bytes of bodies that httpx handed out."""
    counted = [0]
    honest = httpx.Response.aiter_raw

    async def aiter_raw(self, chunk_size=None):
        async for chunk in honest(self, chunk_size):
            counted[0] += len(chunk)
            yield chunk

    monkeypatch.setattr(httpx.Response, "aiter_raw", aiter_raw)
    return counted


@pytest.mark.parametrize("path", ["endless/none", "endless/chunked"])
def test_an_endless_body_is_read_to_the_limit_and_64_KiB(server, taken, path):
    """T-S6: and its sender's connection is closed. A body whose length is declared too large is not read at all."""
    sent = len(server.sent)
    assert refusal(at(server, path), **NAMED) == "image_too_large"
    assert taken[0] <= LIMITS.max_encoded_bytes + (64 << 10)
    wait_until(lambda: len(server.sent) == sent + 1)
    assert server.sent[-1] < 32 << 20  # what the two sockets hold; there were 10 GB to send


def test_no_more_is_read_than_was_declared(server, taken):
    assert fetch(at(server, "endless/lying"), **NAMED)[0] == bytes(99_000)
    assert taken[0] == 99_000


def test_a_body_that_declares_too_much_is_not_read(server, taken):
    assert refusal(at(server, "endless/declared"), **NAMED) == "image_too_large"
    assert taken[0] == 0


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip", "gzip, identity", "x-unknown"])
def test_a_compressed_answer_is_neither_asked_for_nor_read(server, taken, coding):
    """T-S7: a bomb of 1000:1 stays packed."""
    assert refusal(at(server, f"bomb/{coding.replace(' ', '%20')}"), **NAMED) == "image_fetch_failed"
    assert taken[0] == 0
    assert server.seen[-1][1]["Accept-Encoding"] == "identity"


def test_a_bomb_that_says_nothing_stays_packed(server):
    """T-S7: without the header it is what it is, some bytes that are no picture."""
    body, _ = fetch(at(server, "bomb/"), **NAMED)
    assert body[:2] == b"\x1f\x8b" and len(body) < 20_000


def test_endless_headers_end(server):
    assert refusal(at(server, "headers"), **NAMED) == "image_fetch_failed"


def test_every_download_is_timed_whatever_becomes_of_it(server):
    async def run():
        timings = StageTimings()
        fetcher = ImageFetcher(limits=LIMITS, timings=timings, timeout_s=0.3, **NAMED)
        for path in ("picture", "status/500", "big", "slow"):
            try:
                await fetcher.fetch(await fetcher.look_up(at(server, path)))
            except ImageError:
                pass
        with contextlib.suppress(ImageError):
            await fetcher.look_up("http://elsewhere.example/x")  # no download
        await fetcher.close()
        return timings.histograms["fetch"]

    histogram = asyncio.run(run())
    assert histogram.count == 4
    assert 0.25 < histogram.sum_s < 5


# ---- data: URLs ---------------------------------------------------------------------------------------------------------


def data_url(encoded, head="data:image/png;base64"):
    return f"{head},{encoded}"


def test_data_urls():
    encoded = base64.b64encode(PICTURE).decode()
    for head in ("data:image/jpeg;base64", "DATA:image/png;base64", "data:image/png;name=x;base64"):
        assert parse_data_url(data_url(encoded, head), LIMITS) == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64", "data:image/png,abcd", "data:,abcd", "data:text/html;base64,abcd", "data:;base64,abcd",
        "data:image/png;base64,ab,cd", "data:image/png;base64,ab cd", "data:image/png;base64,abc", "data:image/png;base64,ab-_",
        "data:image/png;base64,ab%3D%3D", "data:image/png;base64,abcd\n", "data:image/png;base64,ab=d", "data:image/png;base64,é",
    ],
)  # fmt: skip
def test_bad_data_urls(url):
    with pytest.raises(ImageError) as error:
        parse_data_url(url, LIMITS)
    assert error.value.code == "invalid_image"


def test_a_large_data_url_is_refused_before_decoding(monkeypatch):
    """T-M1: its length says how large it is."""
    import mmv1.preprocess.fetch as module

    monkeypatch.setattr(module.pybase64, "b64decode", None)
    with pytest.raises(ImageError) as error:
        parse_data_url(data_url("A" * 140_000), LIMITS)
    assert error.value.code == "image_too_large"
