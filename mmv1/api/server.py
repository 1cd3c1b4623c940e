"""The HTTP server: routes, request ids, the one shape of errors, and the life of the process from listening to stopping.

What a chat request means is chat.py's and protocol.py's; here are bytes, statuses and connections. Whatever is being computed
for a client is cancelled as soon as its connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import mmv1
from mmv1.api.access import salt_of
from mmv1.api.admission import RETRY_AFTER_S, Admission
from mmv1.api.chat import ChatAnswer, SamplingDefaults
from mmv1.api.completions import CompletionAnswer, CompletionRequest, decode_completion_request
from mmv1.api.embeddings import EmbeddingRequest, decode_embedding_request, embeddings
from mmv1.api.metrics import Metrics
from mmv1.api.middleware import with_middleware
from mmv1.api.page import add_page
from mmv1.api.protocol import (
    ChatCompletionRequest,
    ModelList,
    check_body_size,
    check_model,
    decode_chat_request,
    encode,
    error_of,
    model_not_found,
)
from mmv1.api.served import Served
from mmv1.api.settings import ServerSettings
from mmv1.api.shutdown import Shutdown
from mmv1.api.statistics import BottleneckLine, StatisticsLine
from mmv1.api.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    decode_detokenize_request,
    decode_tokenize_request,
    detokenize,
    tokenize,
)
from mmv1.embedding.embedder import Embedder
from mmv1.errors import EngineDeadError, EngineError, RequestError, ShuttingDownError
from mmv1.log import logger

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM

_MAX_DISCARDED = 4  # times the largest body: so much is read of one that does not say its length, and its sender sees the refusal
_STATISTICS_INTERVAL_S = 10.0
_BOTTLENECK_INTERVAL_S = 60.0
_ENGINE_WATCH_INTERVAL_S = 0.5
_GRACEFUL_SHUTDOWN_S = 10  # after the engine's death; who asks for the end says how long it may take
_DEFAULTS = ServerSettings()
_OF_A_LANGUAGE_MODEL = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
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
    """The body, refused before or while it is read where it is larger than the settings allow. Raises RequestError (413, 415)."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        message = "The body must be JSON, with the header Content-Type: application/json"
        raise RequestError(message, code="unsupported_content_type", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("A compressed body is not supported", code="unsupported_content_type", status=415)
    max_bytes: int = request.app.state.max_request_bytes
    length = request.headers.get("content-length", "")
    check_body_size(int(length) if length.isdecimal() else 0, max_bytes)
    pieces: list[bytes] = []
    received = 0
    try:
        async for piece in request.stream():
            received += len(piece)
            if received <= max_bytes:
                pieces.append(piece)
            elif received > _MAX_DISCARDED * max_bytes:
                break
    except ClientDisconnect:
        raise RequestError("The client disconnected", code="client_disconnected", status=499) from None
    check_body_size(received, max_bytes)
    return b"".join(pieces)


async def _error_answer(_: Request, error: Exception) -> Response:
    """Any exception as OpenAI's error object."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):  # the router's: no such route, no such method
        headers.update(error.headers or {})
        code = _HTTP_CODES.get(error.status_code, "invalid_value")
        error = RequestError(str(error.detail), code=code, status=error.status_code)
    elif isinstance(error, EngineDeadError | ShuttingDownError):
        headers["retry-after"] = str(RETRY_AFTER_S)
    elif not isinstance(error, RequestError):
        headers["x-should-retry"] = "false"  # what broke us once is not sent again by itself
    status, body = error_of(error)
    return JSONAnswer(body, status, headers)


def create_app(
    llm: AsyncLLM | None,
    settings: ServerSettings = _DEFAULTS,
    admission: Admission | None = None,
    embedder: Embedder | None = None,
) -> ASGIApp:
    """The ASGI application over a started AsyncLLM, a started Embedder, or both. Raises ConfigError when generation_config.json
    cannot be used."""
    served = Served(llm, embedder)
    metrics = served.metrics()
    cards = {card.id: card for card in served.cards()}
    app = FastAPI(title="mmv1", version=mmv1.__version__, redirect_slashes=False)
    app.state.max_request_bytes = settings.max_request_bytes
    for kind in (RequestError, EngineError, HTTPException, Exception):
        app.add_exception_handler(kind, _error_answer)

    if llm is not None:
        _add_chat_routes(app, llm, metrics)
        add_page(app)
        if llm.config.device.torch_profiler_dir is not None:
            _add_profile_routes(app, llm)
    else:
        _refuse(app, _OF_A_LANGUAGE_MODEL, "this server has no language model: it was started with --runner pooling")
    if embedder is not None:
        _add_embedding_route(app, embedder)
    else:
        _refuse(app, ("/v1/embeddings",), "this server has no embedding model: start it with --embedding-model NAME:WEIGHTS")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONAnswer(ModelList(list(cards.values())))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in cards:
            raise model_not_found(name)
        return JSONAnswer(cards[name])

    @app.get("/health")
    async def health() -> Response:
        """200 only while the engine steps, and the embedding model, where there is one, is there."""
        await served.check_health()
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get("/ping")
    @app.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        """As /health, with nothing in it."""
        await served.check_health()
        return Response()

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": mmv1.__version__}

    requests = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, EmbeddingRequest)
    _, components = msgspec.json.schema_components(requests, ref_template="#/components/schemas/{name}")
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(components)
    return with_middleware(app, settings, admission or Admission(settings), metrics)


def _body_schema(name: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}


def _refuse(app: FastAPI, paths: Sequence[str], reason: str) -> None:
    """Routes that other servers of mmv1 have say why this one has them not."""

    async def refuse() -> Response:
        raise RequestError(reason, code="no_such_model", status=404)

    for path in paths:
        app.post(path, include_in_schema=False)(refuse)


def _add_embedding_route(app: FastAPI, embedder: Embedder) -> None:
    @app.post("/v1/embeddings", openapi_extra=_body_schema("EmbeddingRequest"))
    async def embed(request: Request) -> Response:
        embedding_request = decode_embedding_request(await _read_json_body(request))
        check_model(embedding_request.model, embedder.name)
        cache_salt = salt_of(request.scope, embedding_request.cache_salt)
        return GeneratedAnswer(embeddings(embedder, embedding_request, cache_salt), stream=False)


def _add_chat_routes(app: FastAPI, llm: AsyncLLM, metrics: Metrics) -> None:
    """What a language model answers, and its tokens."""
    model = llm.config.model
    name = model.served_model_name
    defaults = SamplingDefaults.of_model(model.path)

    @app.post("/v1/chat/completions", openapi_extra=_body_schema("ChatCompletionRequest"))
    async def chat_completions(request: Request) -> Response:
        chat_request = decode_chat_request(await _read_json_body(request))
        check_model(chat_request.model, name)
        chat_request.cache_salt = salt_of(request.scope, chat_request.cache_salt)
        answer = ChatAnswer(llm, chat_request, defaults, metrics)
        stream = bool(chat_request.stream)
        return GeneratedAnswer(answer.events() if stream else answer.full(), stream=stream)

    @app.post("/v1/completions", openapi_extra=_body_schema("CompletionRequest"))
    async def completions(request: Request) -> Response:
        completion_request = decode_completion_request(await _read_json_body(request))
        check_model(completion_request.model, name)
        completion_request.cache_salt = salt_of(request.scope, completion_request.cache_salt)
        answer = CompletionAnswer(llm, completion_request, defaults, metrics)
        stream = bool(completion_request.stream)
        return GeneratedAnswer(answer.events() if stream else answer.full(), stream=stream)

    @app.post("/tokenize", openapi_extra=_body_schema("TokenizeRequest"))
    async def tokenize_prompt(request: Request) -> Response:
        tokenize_request = decode_tokenize_request(await _read_json_body(request))
        check_model(tokenize_request.model or name, name)
        return JSONAnswer(await tokenize(llm, tokenize_request, salt_of(request.scope, None)))

    @app.post("/detokenize", openapi_extra=_body_schema("DetokenizeRequest"))
    async def detokenize_tokens(request: Request) -> Response:
        detokenize_request = decode_detokenize_request(await _read_json_body(request))
        check_model(detokenize_request.model or name, name)
        return JSONAnswer(await asyncio.to_thread(detokenize, llm, detokenize_request))


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
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `serve`'s: uvicorn would raise them again at the end, and a clean stop would look like a kill."""
        yield


async def serve(
    llm: AsyncLLM | None,
    listener: socket.socket,
    started_at: float | None = None,
    settings: ServerSettings = _DEFAULTS,
    embedder: Embedder | None = None,
) -> int:
    """Answer on the bound socket `listener` until SIGTERM, SIGINT or the engine's death. Returns the exit status. `started_at`:
    when, by time.monotonic(), the command was given."""
    admission = Admission(settings)
    served = Served(llm, embedder)
    config = uvicorn.Config(
        create_app(llm, settings, admission, embedder),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.handlers, uvicorn_logger.propagate = list(logger.handlers), False
    uvicorn_logger.setLevel(uvicorn.config.LOG_LEVELS[settings.uvicorn_log_level])
    server = _Server(config)
    shutdown = Shutdown(admission, settings.shutdown_timeout_s, served.end_requests)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, shutdown.ask)
    listener.listen(config.backlog)  # whoever reads the next lines may connect
    _log_start(served, listener, settings)
    if started_at is not None:
        logger.info("Ready after %.1f s", time.monotonic() - started_at)
    works = (_stop_with_engine(served, server), _stop_when_asked(shutdown, server), *_periodic_lines(served))
    background = [asyncio.ensure_future(work) for work in works]
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
    return 0 if shutdown.was_asked else 1


async def _stop_when_asked(shutdown: Shutdown, server: _Server) -> None:
    server.force_exit = not await shutdown.run()
    server.should_exit = True


async def _stop_with_engine(served: Served, server: _Server) -> None:
    while served.is_ready:
        await asyncio.sleep(_ENGINE_WATCH_INTERVAL_S)
    logger.error("The engine is dead; stopping the server")
    server.should_exit = True


def _periodic_lines(served: Served) -> list[Coroutine[Any, Any, None]]:
    llm, pictures = served.llm, served.pictures
    bottleneck = BottleneckLine(served.preprocess.num_workers)
    lines = [
        _log_every(_BOTTLENECK_INTERVAL_S, lambda elapsed_s: bottleneck.next(pictures.stats(), pictures.timings, elapsed_s))
    ]
    if llm is not None:
        read_stats = llm.stats
        statistics = StatisticsLine(llm.ready.device if llm.ready is not None else "cpu")
        lines.append(
            _log_every(_STATISTICS_INTERVAL_S, lambda elapsed_s: statistics.next(read_stats(), pictures.stats(), elapsed_s))
        )
    return lines


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


def _log_start(served: Served, listener: socket.socket, settings: ServerSettings) -> None:
    served.log_start()
    host, port = listener.getsockname()[:2]
    posts = [*(_OF_A_LANGUAGE_MODEL if served.llm else ()), *(("/v1/embeddings",) if served.embedder else ())]
    gets = [*(("/",) if served.llm else ()), "/v1/models", "/health", "/ping", "/metrics", "/version", "/docs"]
    profiling: tuple[str, ...] = ()
    if served.llm is not None and served.llm.config.device.torch_profiler_dir is not None:
        profiling = ("POST /start_profile", "POST /stop_profile")
    routes = (*(f"POST {path}" for path in posts), *(f"GET {path}" for path in gets), *profiling)
    for route in routes:
        logger.info("Route: %s", route)
    if settings.api_keys:
        logger.info("API keys: %d, each a tenant that shares no cache with the others", len(set(settings.api_keys)))
    url = f"http{'s' if settings.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"
    names = " and ".join(card.id for card in served.cards())
    logger.info("Application startup complete. Serving %s on %s", names, url)
