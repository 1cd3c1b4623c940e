"""https: the certificate must be the name's, though an address is dialled, and come from an authority that is trusted here."""

import asyncio
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.fetch import ImageFetcher
from mmv1.preprocess.media import ImageLimits
from mmv1.preprocess.timings import StageTimings
from tests.pictures import make_image

TLS = Path(__file__).parent / "tls"
LIMITS = ImageLimits(max_encoded_bytes=100_000, max_pixels=1 << 30, max_side=1 << 20)
PICTURE = make_image(40, 30)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.hosts.append(self.headers["Host"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def get_request(self):
        """The handshake happens here, so that one that fails is no request."""
        connection, address = super().get_request()
        return self.context.wrap_socket(connection, server_side=True), address


@pytest.fixture(scope="module")
def server():
    """For https://pictures.example; `names` are those that clients' handshakes asked for."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.context.load_cert_chain(TLS / "server.pem")
        server.hosts, server.names = [], []
        server.context.sni_callback = lambda connection, name, context: server.names.append(name)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trusted(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))


def fetch(server, host):
    async def resolve(name, port):
        return ["127.0.0.1"]

    async def run():
        domains = ["pictures.example", "other.example", "127.0.0.1"]
        fetcher = ImageFetcher(limits=LIMITS, timings=StageTimings(), allowed_domains=domains, resolve=resolve)
        try:
            return await fetcher.fetch(await fetcher.look_up(f"https://{host}:{server.server_port}/picture"))
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(server, host):
    before = len(server.hosts)
    with pytest.raises(ImageError) as error:
        fetch(server, host)
    assert len(server.hosts) == before  # no request was sent
    assert not any(word in error.value.message for word in ("certificate", "ssl", "SSL", "127.0.0.1"))
    return error.value.code


def test_the_name_is_proven_though_an_address_is_dialled(server, trusted):
    assert fetch(server, "pictures.example") == PICTURE
    assert server.names[-1] == "pictures.example"
    assert server.hosts[-1] == f"pictures.example:{server.server_port}"


def test_a_certificate_of_another_name_is_refused(server, trusted):
    assert refusal(server, "other.example") == "image_fetch_failed"
    assert server.names[-1] == "other.example"
    assert refusal(server, "127.0.0.1") == "image_fetch_failed"


def test_an_unknown_authority_is_refused(server):
    assert refusal(server, "pictures.example") == "image_fetch_failed"


def test_a_directory_of_authorities(server, monkeypatch, tmp_path):
    """Named after the hash of its subject, as openssl looks it up."""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert refusal(server, "pictures.example") == "image_fetch_failed"
    (tmp_path / "e92b40ae.0").write_bytes((TLS / "authority.pem").read_bytes())
    assert fetch(server, "pictures.example") == PICTURE


def test_a_server_that_speaks_no_tls(server, trusted):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as plain:
        plain.hosts = []
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        assert refusal(plain, "pictures.example") == "image_fetch_failed"
        plain.shutdown()


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_authorities_that_cannot_be_read_are_told_at_start(monkeypatch, tmp_path, content):
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        ImageFetcher(limits=LIMITS, timings=StageTimings())
