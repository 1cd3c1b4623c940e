"""Fetching under the policy: what is refused is refused before anything is dialled; what is allowed is bounded."""

import asyncio
import base64
import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmv1.errors import ImageError
from mmv1.preprocess.fetch import ImageFetcher, is_public, parse_data_url
from mmv1.preprocess.media import ImageLimits
from tests.pictures import make_image

LIMITS = ImageLimits(max_encoded_bytes=100_000, max_pixels=1 << 30, max_side=1 << 20)
PICTURE = make_image(64, 48)


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

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.seen, server.released = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(url, **options):
    async def run():
        fetcher = ImageFetcher(limits=LIMITS, **options)
        try:
            return await fetcher.fetch(url), fetcher
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
        fetcher = ImageFetcher(limits=LIMITS, allowed_domains=["a.example", "b.example"], resolve=resolve)
        for host in ("a.example", "a.example", "b.example"):
            await fetcher.fetch(f"http://{host}:{server.server_port}/cookie")
        await fetcher.close()

    asyncio.run(run())
    assert [headers.get("Cookie") for _, headers in server.seen[-3:]] == [None] * 3


def test_the_wait_for_a_turn_has_an_end(server):
    """Hosts that hang take every turn; who comes next is told so in time, and not after all of them."""

    async def resolve(host, port):
        await asyncio.sleep(3600)

    async def run():
        fetcher = ImageFetcher(limits=LIMITS, timeout_s=0.5, resolve=resolve)
        fetches = [fetcher.fetch(f"http://{n}.example/x") for n in range(200)]
        async with asyncio.timeout(1.2):  # three full rounds of 64 would take 1.5 s
            return await asyncio.gather(*fetches, return_exceptions=True)

    assert {error.code for error in asyncio.run(run())} == {"image_fetch_timeout"}


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

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"https://pictures.example:{listener.getsockname()[1]}/picture"
        assert refusal(url, allowed_domains=["pictures.example"], resolve=resolve) == "image_fetch_failed"
        thread.join()
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
    import mmv1.preprocess.fetch as module

    monkeypatch.setattr(module.pybase64, "b64decode", None)
    with pytest.raises(ImageError) as error:
        parse_data_url(data_url("A" * 140_000), LIMITS)
    assert error.value.code == "image_too_large"
