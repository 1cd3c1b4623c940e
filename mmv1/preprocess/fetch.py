"""Pictures named by URL: `data:` URLs are parsed, http(s) URLs downloaded under a policy. Nothing else fetches over HTTP.

The policy, against requests forged through this server: http and https only, no credentials; the host is resolved once, every
address it has must be a public one, and the address that was checked is the one that is dialled; the same at every redirect.
An allow-list of hosts replaces the address check: the operator named them, so they may be private. One parser (httpx.URL)
reads what is checked and what is dialled.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, NamedTuple, TypeVar

import httpx
import pybase64

from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.media import ImageLimits
from mmv1.preprocess.timings import StageTimings

_MAX_CONCURRENT_FETCHES = 64
_MAX_CONCURRENT_LOOKUPS = 64
_MAX_REDIRECTS = 5
_MAX_URL_LENGTH = 8192
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
# Not the Internet, though `ipaddress` calls them global, in some versions: protocol assignments, the relays of 6to4, the wire
# server inside every Azure host, NAT64, site-local addresses, documentation.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "64:ff9b::/96", "fec0::/10", "3fff::/20")
)
_HEADERS = {"User-Agent": "mmv1", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")  # a name, in ASCII by now, or an address
_DOMAIN = re.compile(r"[^\s/?#@:*\\\[\]]+|\[[0-9A-Fa-f:.]+\]")  # of the allow-list

T = TypeVar("T")
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


def parse_data_url(url: str, limits: ImageLimits) -> bytes:
    """The bytes of `data:image/...;base64,...`. Strict: base64 in its standard alphabet, padded, and nothing else."""
    head, comma, encoded = url.partition(",")
    media_type, *parameters = head[len("data:") :].split(";")
    if not comma or not parameters or parameters[-1].strip().lower() != "base64":
        raise ImageError("a data: URL of an image must have the form data:image/...;base64,...")
    if not media_type.strip().lower().startswith("image/"):
        raise ImageError("the media type of a data: URL must be an image type")
    limits.check_encoded(len(encoded) * 3 // 4 - 2)
    try:
        return pybase64.b64decode(encoded, validate=True)
    except ValueError:
        raise ImageError("the data: URL's image is not valid base64") from None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, also where an IPv4 address hides inside an IPv6 one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None:
            return False
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified)


class Target(NamedTuple):
    """A URL that may be fetched, and the addresses that may be dialled for it. `lookup_s`: what it took to learn them."""

    url: httpx.URL
    addresses: Sequence[str]
    lookup_s: float = 0.0


class ImageFetcher:
    """Downloads pictures, so many at once: `look_up` says what may be dialled, `fetch` dials it.

    `allowed_domains`: when not empty, only these hosts, by exact name. `timeout_s` is for one picture, look-ups, redirects and
    the wait for its turn included: hosts that hang cannot hold up others for longer. Certificates must have been issued under
    certifi's roots, or under those that SSL_CERT_FILE or SSL_CERT_DIR name. Raises ConfigError where these cannot be read, and
    for a domain that is no host name.
    """

    def __init__(
        self,
        *,
        limits: ImageLimits,
        timings: StageTimings,
        allowed_domains: Sequence[str] = (),
        timeout_s: float = 10.0,
        resolve: Resolve | None = None,
    ) -> None:
        self._limits = limits
        self._timings = timings
        self._allowed = frozenset(_allowed_host(domain) for domain in allowed_domains)
        self._timeout_s = timeout_s
        self._resolve = resolve or self._ask_system
        # A look-up cannot be cancelled: in threads of their own, slow name servers hold up nothing but look-ups.
        self._lookups = ThreadPoolExecutor(_MAX_CONCURRENT_LOOKUPS, "look-up")
        self._turns = asyncio.Semaphore(_MAX_CONCURRENT_FETCHES)
        self._client = _client(connect_timeout_s=timeout_s / 2)  # a dead first address leaves time for the next
        self.num_fetches = 0
        self.fetched_bytes = 0

    async def look_up(self, url: str) -> Target:
        """All that can be checked of `url` without dialling its host. Raises ImageError: image_url_forbidden,
        image_fetch_failed, image_fetch_timeout."""
        started = time.monotonic()
        target = await self._within_time(self._checked(_parse(url)))
        return target._replace(lookup_s=time.monotonic() - started)

    async def fetch(self, target: Target) -> bytes:
        """The body behind `target`. Raises ImageError: those of `look_up`, and image_too_large."""
        self.num_fetches += 1
        started = time.monotonic()
        try:
            body = await self._within_time(self._follow(target), spent_s=target.lookup_s)
        except ImageError:
            self._timings.observe("fetch", target.lookup_s + time.monotonic() - started)
            raise
        self._timings.observe("fetch", target.lookup_s + time.monotonic() - started)
        self.fetched_bytes += len(body)
        return body

    async def close(self) -> None:
        self._lookups.shutdown(wait=False, cancel_futures=True)
        await self._client.aclose()

    async def _within_time(self, work: Coroutine[Any, Any, T], spent_s: float = 0.0) -> T:
        """What `work` gives. Its failures become ImageErrors that say nothing of addresses."""
        try:
            async with asyncio.timeout(self._timeout_s - spent_s):
                return await work
        except (TimeoutError, httpx.TimeoutException):
            message = f"the image could not be downloaded within {self._timeout_s:g} seconds"
            raise ImageError(message, code="image_fetch_timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError):
            raise ImageError("the image could not be downloaded", code="image_fetch_failed") from None

    async def _checked(self, url: httpx.URL) -> Target:
        """One private address among them condemns the host."""
        if self._allowed and _normal(url) not in self._allowed:
            raise ImageError("images from this host are not allowed here", code="image_url_forbidden")
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._resolve(url.raw_host.decode("ascii"), port)
        if not self._allowed and not all(is_public(address) for address in addresses):
            raise ImageError("the image URL does not name a public host", code="image_url_forbidden")
        return Target(url, addresses)

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        """Every address of a host, each once, in the system's order of preference."""
        ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        infos = await asyncio.get_running_loop().run_in_executor(self._lookups, ask)
        return list(dict.fromkeys(str(info[4][0]) for info in infos))

    async def _follow(self, target: Target) -> bytes:
        async with self._turns:
            for _ in range(_MAX_REDIRECTS + 1):
                body = await self._get(target)
                if isinstance(body, bytes):
                    return body
                target = await self._checked(_parse(str(target.url.join(body))))
        raise ImageError(f"the image URL redirects more than {_MAX_REDIRECTS} times", code="image_fetch_failed")

    async def _get(self, target: Target) -> bytes | str:
        """The body, or where a redirect leads. Tries the host's addresses in order until one accepts a connection."""
        error: httpx.TransportError | None = None
        for address in target.addresses:
            try:
                return await self._get_from(target.url, address)
            except (httpx.ConnectError, httpx.ConnectTimeout) as refused:
                error = refused
        raise error or httpx.ConnectError("the host has no address")

    async def _get_from(self, url: httpx.URL, address: str) -> bytes | str:
        """Dial `address`, whatever the name resolves to by now; the name stays in the Host header and in the TLS handshake,
        where it must be the certificate's."""
        headers = {**_HEADERS, "Host": url.netloc.decode("ascii")}
        extensions = {"sni_hostname": url.raw_host.decode("ascii")} if url.scheme == "https" else {}
        async with self._client.stream("GET", url.copy_with(host=address), headers=headers, extensions=extensions) as response:
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return str(response.headers["location"])
            if response.status_code != 200:
                message = f"the image's server answered with status {response.status_code}"
                raise ImageError(message, code="image_fetch_failed")
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise ImageError("the image's server sent a compressed answer", code="image_fetch_failed")
            declared = response.headers.get("content-length", "")
            if declared.isdecimal() and len(declared) < 20:
                self._limits.check_encoded(int(declared))
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                self._limits.check_encoded(len(body))
            return bytes(body)


def _client(connect_timeout_s: float) -> httpx.AsyncClient:
    """Keeps no connection: one dialled by address must not be used again under another name. Keeps no cookie: one user's must
    not be sent for another. Follows no redirect by itself, and no proxy that would do the look-up."""
    try:
        trusted = httpx.create_ssl_context(trust_env=True)  # of the environment, the certificates alone
    except (OSError, ssl.SSLError) as error:
        reason = type(error).__name__
        raise ConfigError(f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR name cannot be read ({reason})") from error
    return httpx.AsyncClient(
        verify=trusted,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(None, connect=connect_timeout_s),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
    )


def _allowed_host(domain: str) -> str:
    """Raises ConfigError."""
    if not _DOMAIN.fullmatch(domain):
        raise ConfigError(f"--allowed-media-domains takes host names, without scheme, port and wildcards; not {domain!r}")
    try:
        return _normal(httpx.URL(f"http://{domain}/"))
    except (httpx.InvalidURL, ValueError):
        raise ConfigError(f"--allowed-media-domains: {domain!r} is no host name") from None


def _normal(url: httpx.URL) -> str:
    """The host's name, in the one spelling that names are compared in."""
    return url.raw_host.decode("ascii").lower().rstrip(".")


def _parse(url: str) -> httpx.URL:
    """A URL that may be fetched as far as its text goes. Raises ImageError."""
    if len(url) > _MAX_URL_LENGTH:
        raise ImageError("the image URL is too long", code="image_url_forbidden")
    if not url.isprintable() or "\\" in url or " " in url:
        raise ImageError("the image URL has characters that a URL may not have", code="image_url_forbidden")
    try:
        target = httpx.URL(url)
        port = target.port
    except (httpx.InvalidURL, ValueError, UnicodeError):
        raise ImageError("the image URL is not a valid URL", code="image_url_forbidden") from None
    if target.scheme not in ("http", "https"):
        raise ImageError("an image URL must be a data:, http:, https: or file: URL", code="image_url_forbidden")
    host = target.raw_host.decode("ascii", errors="replace")
    if target.userinfo or not _HOST.fullmatch(host) or port == 0 or (port or 0) > 65535:
        raise ImageError("an image URL must name a host, and no credentials", code="image_url_forbidden")
    return target
