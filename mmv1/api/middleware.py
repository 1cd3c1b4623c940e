"""What stands before the routes, for every request: ids, other origins, the root path, keys, and what is taken in."""

from __future__ import annotations

import re
import uuid

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmv1.api.access import ApiKeys, RootPath
from mmv1.api.admission import Admission, AdmissionControl
from mmv1.api.metrics import Metrics
from mmv1.api.settings import ServerSettings
from mmv1.log import logger

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)


class RequestIds:
    """Puts x-request-id on every reply (the client's own, if it is a plain one) and keeps failures from the client's eyes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # answered already, by `_error_answer`
            logger.exception("Request %s failed", request_id.decode())


def with_middleware(app: ASGIApp, settings: ServerSettings, admission: Admission, metrics: Metrics) -> ASGIApp:
    """Outermost first: an id for every reply; leave for pages of other origins to read it; a key; a place in the queue."""
    app = AdmissionControl(app, admission, metrics.admission_rejections.inc)
    if settings.api_keys:
        app = ApiKeys(app, settings.api_keys)
    if settings.root_path:
        app = RootPath(app, settings.root_path)
    if settings.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=("x-request-id", "retry-after"),
        )
    return RequestIds(app)
