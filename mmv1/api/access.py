"""Who asks: API keys, and the tenant that each of them is.

A tenant's name is a digest of its key, so servers with the same keys agree on it and nobody can take it from the outside. It
goes before the cache salt of every request, which is in the name of every picture and at the root of every KV block: tenants
share no prefix, no embedding and no picture, in this process or in a Redis.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mmv1.api.protocol import encode, error_of
from mmv1.errors import RequestError

_TENANT = "mmv1.tenant"  # in the ASGI scope
# Open to all, as in vLLM: what says that and how the server works, and nothing of what is asked. Everything else needs a key.
_OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/ping", "/version", "/docs", "/openapi.json"})


class RootPath:
    """Says in each scope what a proxy has put before all paths; routes are found with and without it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._root_path}, receive, send)


def route_path(scope: Scope) -> str:
    """The path that the router will see: less the root path, whether or not the proxy has taken it off. Only of what stands in
    the request line: a Host header cannot change it."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        return path[len(root_path) :]
    return path


def is_open(scope: Scope) -> bool:
    """Whether it is a path that everybody may ask, at any time."""
    return route_path(scope) in _OPEN_PATHS


def refusal(error: RequestError, headers: Mapping[str, str]) -> Response:
    status, body = error_of(error)
    return Response(encode(body), status, headers, "application/json")


def tenant_of(scope: Scope) -> str:
    """The empty string where there are no keys."""
    tenant: str = scope.get(_TENANT, "")
    return tenant


def salt_of(scope: Scope, cache_salt: str | None) -> str:
    """What `AsyncLLM.generate` must get as cache_salt: the client's own only narrows what its tenant shares with itself."""
    tenant = tenant_of(scope)
    return f"{tenant}/{cache_salt or ''}" if tenant else cache_salt or ""


class ApiKeys:
    """Lets a request through that names one of `keys` (Authorization: Bearer KEY), and says in its scope whose it is."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._tenants = [_digest(key.encode()) for key in dict.fromkeys(keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            tenant = self._tenant(given)
            if tenant is not None:
                scope = {**scope, _TENANT: tenant}
            elif not is_open(scope):
                message = "Incorrect API key provided" if given else "No API key is given: send Authorization: Bearer KEY"
                error = RequestError(message, code="invalid_api_key", status=401)
                await refusal(error, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _tenant(self, authorization: bytes) -> str | None:
        """Takes as long for every key, right or wrong: digests are compared, each with all, and no comparison stops early."""
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest, found = _digest(key.strip()), None
        for tenant in self._tenants:
            if hmac.compare_digest(tenant, digest):
                found = tenant
        return found


def _digest(key: bytes) -> str:
    return hashlib.sha256(b"mmv1/tenant/1" + key).hexdigest()
