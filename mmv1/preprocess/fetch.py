"""Pictures named by URL: `data:` URLs are parsed, http(s) URLs downloaded under a policy. Nothing else fetches over HTTP.

The policy, against requests forged through this server: http and https only, no credentials; the host is resolved once, every
address it has must be a public one, and the address that was checked is the one that is dialled; the same at every redirect.
An allow-list of hosts replaces the address check: the operator named them, so they may be private. One parser (httpx.URL)
reads what is checked and what is dialled.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
import pybase64

from mmv1.errors import ImageError
from mmv1.preprocess.media import ImageLimits

_MAX_CONCURRENT_FETCHES = 64
_MAX_REDIRECTS = 5
_MAX_URL_LENGTH = 8192
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_HEADERS = {"User-Agent": "mmv1", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}

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
        if ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified)


async def _resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a host, each once, in the system's order of preference."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


class ImageFetcher:
    """Downloads pictures, so many at once. `allowed_domains`: when not empty, only these hosts, by exact name. `timeout_s` is
    for one picture, redirects and the wait for its turn included: hosts that hang cannot hold up others for longer."""

    def __init__(
        self, *, limits: ImageLimits, allowed_domains: Sequence[str] = (), timeout_s: float = 10.0, resolve: Resolve = _resolve
    ) -> None:
        self._limits = limits
        self._allowed = frozenset(_normal(domain) for domain in allowed_domains)
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._turns = asyncio.Semaphore(_MAX_CONCURRENT_FETCHES)
        self._client: httpx.AsyncClient | None = None
        self.num_fetches = 0
        self.fetched_bytes = 0

    async def fetch(self, url: str) -> bytes:
        """The body behind `url`. Raises ImageError: image_url_forbidden, image_fetch_failed, image_fetch_timeout,
        image_too_large."""
        target = _parse(url)
        self._check_host(target)
        self.num_fetches += 1
        try:
            async with asyncio.timeout(self._timeout_s), self._turns:
                body = await self._follow(target)
        except (TimeoutError, httpx.TimeoutException):
            message = f"the image could not be downloaded within {self._timeout_s:g} seconds"
            raise ImageError(message, code="image_fetch_timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError):
            raise ImageError("the image could not be downloaded", code="image_fetch_failed") from None
        self.fetched_bytes += len(body)
        return body

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _follow(self, target: httpx.URL) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            body = await self._get(target)
            if isinstance(body, bytes):
                return body
            target = _parse(str(target.join(body)))
            self._check_host(target)
        raise ImageError(f"the image URL redirects more than {_MAX_REDIRECTS} times", code="image_fetch_failed")

    def _check_host(self, target: httpx.URL) -> None:
        if self._allowed and _normal(target.host) not in self._allowed:
            raise ImageError("images from this host are not allowed here", code="image_url_forbidden")

    async def _addresses(self, target: httpx.URL) -> Sequence[str]:
        """Addresses that may be dialled. One private address among them condemns the host."""
        port = target.port or (443 if target.scheme == "https" else 80)
        addresses = await self._resolve(target.raw_host.decode("ascii"), port)
        if not self._allowed and not all(is_public(address) for address in addresses):
            raise ImageError("the image URL does not name a public host", code="image_url_forbidden")
        return addresses

    async def _get(self, target: httpx.URL) -> bytes | str:
        """The body, or where a redirect leads. Tries the host's addresses in order until one accepts a connection."""
        error: httpx.TransportError | None = None
        for address in await self._addresses(target):
            try:
                return await self._get_from(target, address)
            except (httpx.ConnectError, httpx.ConnectTimeout) as refused:
                error = refused
        raise error or httpx.ConnectError("the host has no address")

    async def _get_from(self, target: httpx.URL, address: str) -> bytes | str:
        """Dial `address`, whatever the name resolves to by now; the name stays in the Host header and in the TLS handshake."""
        if self._client is None:  # no connection is kept: one dialled by address must not be reused under another name
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            timeout = httpx.Timeout(None, connect=self._timeout_s / 2)  # a dead first address leaves time for the next
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # one user's must not be sent for another
            self._client = httpx.AsyncClient(
                trust_env=False, follow_redirects=False, timeout=timeout, limits=limits, cookies=no_cookies
            )
        headers = {**_HEADERS, "Host": target.netloc.decode("ascii")}
        extensions = {"sni_hostname": target.raw_host.decode("ascii")} if target.scheme == "https" else {}
        async with self._client.stream("GET", target.copy_with(host=address), headers=headers, extensions=extensions) as response:
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


def _normal(host: str) -> str:
    return host.lower().rstrip(".")


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
        raise ImageError("an image URL must be a data:, http: or https: URL", code="image_url_forbidden")
    if target.userinfo or not target.host or port == 0 or (port or 0) > 65535:
        raise ImageError("an image URL must name a host, and no credentials", code="image_url_forbidden")
    return target
