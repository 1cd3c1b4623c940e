"""The HTTP server: routes, request ids, the one shape of errors, and the life of the process from listening to stopping.

What a chat request means is chat.py's and protocol.py's; here are bytes, statuses and connections. Whatever is being computed
for a client is cancelled as soon as its connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mmv1
from mmv1.api.chat import ChatAnswer, SamplingDefaults
from mmv1.api.metrics import Metrics
from mmv1.api.protocol import (
    MAX_BODY_BYTES,
    ChatCompletionRequest,
    ModelCard,
    ModelList,
    check_body_size,
    check_model,
    decode_chat_request,
    encode,
    error_of,
)
from mmv1.api.statistics import BottleneckLine, StatisticsLine, name_of_kv_cache
from mmv1.errors import EngineDeadError, EngineError, RequestError
from mmv1.log import logger

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM

_MAX_DISCARDED_BYTES = 4 * MAX_BODY_BYTES  # of a body that is refused: read so far, its sender sees the refusal
_STATISTICS_INTERVAL_S = 10.0
_BOTTLENECK_INTERVAL_S = 60.0
_ENGINE_WATCH_INTERVAL_S = 0.5
_GRACEFUL_SHUTDOWN_S = 10
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class JSONAnswer(Response):
    media_type = "application/json"

    def __init__(self, message: msgspec.Struct, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(encode(message), status_code, headers)


class GeneratedAnswer(Response):
    """Sends what `chunks` yields: one JSON body, or events. The head waits for the first chunk, so that an error before it is
    an answer with a status of its own. A client that goes away closes `chunks`, at any time."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], *, stream: bool) -> None:
        super().__init__(media_type="text/event-stream" if stream else "application/json")
        self._chunks = chunks
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _run_while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            length = (b"cache-control", b"no-cache") if self._stream else (b"content-length", str(len(first)).encode())
            headers = [header for header in self.raw_headers if header[0] != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": [*headers, length]})
            await send({"type": "http.response.body", "body": first, "more_body": self._stream})
            if self._stream:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it when the client disconnects. The request's body must have been read."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def _read_json_body(request: Request) -> bytes:
    """The body, at most MAX_BODY_BYTES of it, refused while it is read. Raises RequestError (413, 415)."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        message = "The body must be JSON, with the header Content-Type: application/json"
        raise RequestError(message, code="unsupported_content_type", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("A compressed body is not supported", code="unsupported_content_type", status=415)
    pieces: list[bytes] = []
    received = 0
    try:
        async for piece in request.stream():
            received += len(piece)
            if received <= MAX_BODY_BYTES:
                pieces.append(piece)
            elif received > _MAX_DISCARDED_BYTES:
                break
    except ClientDisconnect:
        raise RequestError("The client disconnected", code="client_disconnected", status=499) from None
    check_body_size(received)
    return b"".join(pieces)


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


async def _error_answer(_: Request, error: Exception) -> Response:
    """Any exception as OpenAI's error object."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # the router's: no such route, no such method
        headers.update(error.headers or {})
        code = _HTTP_CODES.get(error.status_code, "invalid_value")
        error = RequestError(str(error.detail), code=code, status=error.status_code)
    elif isinstance(error, EngineDeadError):
        headers["retry-after"] = "5"
    elif not isinstance(error, RequestError):
        headers["x-should-retry"] = "false"  # what broke us once is not sent again by itself
    status, body = error_of(error)
    return JSONAnswer(body, status, headers)


def create_app(llm: AsyncLLM) -> ASGIApp:
    """The ASGI application over a started AsyncLLM. Raises ConfigError when generation_config.json cannot be used."""
    model = llm.config.model
    defaults = SamplingDefaults.of_model(model.path)
    metrics = Metrics(model.served_model_name, llm.stats, llm.preprocessor.stats, llm.preprocessor.timings)
    name, root = model.served_model_name, model.path
    card = ModelCard(id=name, created=int(time.time()), root=root, max_model_len=llm.max_model_len)
    app = FastAPI(title="mmv1", version=mmv1.__version__, redirect_slashes=False)
    for kind in (RequestError, EngineError, HTTPException, Exception):
        app.add_exception_handler(kind, _error_answer)

    schema = {"schema": {"$ref": "#/components/schemas/ChatCompletionRequest"}}
    body_schema = {"requestBody": {"required": True, "content": {"application/json": schema}}}

    @app.post("/v1/chat/completions", openapi_extra=body_schema)
    async def chat_completions(request: Request) -> Response:
        chat_request = decode_chat_request(await _read_json_body(request))
        check_model(chat_request.model, card.id)
        answer = ChatAnswer(llm, chat_request, defaults, metrics)
        stream = bool(chat_request.stream)
        return GeneratedAnswer(answer.events() if stream else answer.full(), stream=stream)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONAnswer(ModelList([card]))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        check_model(name, card.id)
        return JSONAnswer(card)

    @app.get("/health")
    async def health() -> Response:
        """200 only while the engine steps."""
        await llm.check_health()
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    if llm.config.device.torch_profiler_dir is not None:
        _add_profile_routes(app, llm)
    _, components = msgspec.json.schema_components([ChatCompletionRequest], ref_template="#/components/schemas/{name}")
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(components)
    return RequestIds(app)


def _add_profile_routes(app: FastAPI, llm: AsyncLLM) -> None:
    """vLLM's, and as there only in a server that was told where traces go."""

    @app.post("/start_profile")
    async def start_profile() -> Response:
        await llm.profile(start=True)
        return Response()

    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        """Returns when the trace is on disk."""
        await llm.profile(start=False)
        return Response()


class _Server(uvicorn.Server):
    was_asked_to_stop = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `serve`'s: uvicorn would raise them again at the end, and a clean stop would look like a kill."""
        yield

    def stop(self) -> None:
        """Finish what is being answered, then end; the second time, at once."""
        self.force_exit = self.was_asked_to_stop
        self.was_asked_to_stop = self.should_exit = True


async def serve(llm: AsyncLLM, listener: socket.socket, started_at: float | None = None) -> int:
    """Answer on the bound socket `listener` until SIGTERM, SIGINT or the engine's death. Returns the exit status. `started_at`:
    when, by time.monotonic(), the command was given."""
    config = uvicorn.Config(
        create_app(llm),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
    )
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.handlers, uvicorn_logger.propagate = list(logger.handlers), False
    uvicorn_logger.setLevel(logging.WARNING)
    server = _Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    listener.listen(config.backlog)  # whoever reads the next lines may connect
    _log_start(llm, listener)
    if started_at is not None:
        logger.info("Ready after %.1f s", time.monotonic() - started_at)
    background = [asyncio.ensure_future(work) for work in (_stop_with_engine(llm, server), *_periodic_lines(llm))]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
    return 0 if server.was_asked_to_stop else 1


async def _stop_with_engine(llm: AsyncLLM, server: _Server) -> None:
    while llm.is_ready:
        await asyncio.sleep(_ENGINE_WATCH_INTERVAL_S)
    logger.error("The engine is dead; stopping the server")
    server.should_exit = True


def _periodic_lines(llm: AsyncLLM) -> tuple[Coroutine[Any, Any, None], ...]:
    preprocessor = llm.preprocessor
    statistics = StatisticsLine(llm.ready.device if llm.ready is not None else "cpu")
    bottleneck = BottleneckLine(llm.config.preprocess.num_workers)
    return (
        _log_every(_STATISTICS_INTERVAL_S, lambda elapsed_s: statistics.next(llm.stats(), preprocessor.stats(), elapsed_s)),
        _log_every(
            _BOTTLENECK_INTERVAL_S, lambda elapsed_s: bottleneck.next(preprocessor.stats(), preprocessor.timings, elapsed_s)
        ),
    )


async def _log_every(interval_s: float, next_line: Callable[[float], str | None]) -> None:
    """Log what `next_line` makes of the seconds since it was last asked, if anything."""
    before = time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        now = time.monotonic()
        line = next_line(now - before)
        before = now
        if line is not None:
            logger.info(line)


def _log_start(llm: AsyncLLM, listener: socket.socket) -> None:
    model, preprocess, ready = llm.config.model, llm.config.preprocess, llm.ready
    if ready is not None:
        num_tokens = ready.num_kv_blocks * ready.block_size
        logger.info("Model: %s (%s), %s on %s", model.served_model_name, model.architecture, ready.dtype, ready.device)
        logger.info("Attention backend: %s", ready.attention_backend)
        blocks = f"{ready.num_kv_blocks} blocks of {ready.block_size} tokens"
        logger.info("%s size: %s tokens (%s)", name_of_kv_cache(ready.device), f"{num_tokens:,}", blocks)
        concurrency = num_tokens / ready.max_model_len
        logger.info("Maximum concurrency for %s tokens per request: %.2fx", f"{ready.max_model_len:,}", concurrency)
        logger.info("Encoder cache size: %.1f MiB", ready.encoder_cache_bytes / (1 << 20))
    slab_mib = llm.preprocessor.stats().slab_bytes / (1 << 20)
    redis = "yes" if preprocess.redis_url else "no"
    logger.info("Preprocess workers: %d, slab: %.1f MiB, Redis: %s", preprocess.num_workers, slab_mib, redis)
    host, port = listener.getsockname()[:2]
    profiling = ("POST /start_profile", "POST /stop_profile") if llm.config.device.torch_profiler_dir is not None else ()
    for route in ("POST /v1/chat/completions", "GET /v1/models", "GET /health", "GET /metrics", "GET /docs", *profiling):
        logger.info("Route: %s", route)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("Application startup complete. Serving %s on %s", model.served_model_name, url)
