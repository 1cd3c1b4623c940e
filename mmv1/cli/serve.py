"""`mmv1 serve`: from settings to a listening socket, an engine, an embedding model or both, and the HTTP server over them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import socket
import ssl
import time
import types

from mmv1.api.settings import DEFAULT_MAX_REQUEST_BYTES, DEFAULT_SHUTDOWN_TIMEOUT_S, ServerSettings
from mmv1.cli.event_loop import run_until_signal
from mmv1.cli.options import json_list
from mmv1.config import EngineArgs, EngineConfig, PreprocessConfig, has_cuda_device, resolve, resolve_preprocess
from mmv1.embedding.settings import DEFAULT_CACHE_BYTES, EmbeddingSettings
from mmv1.errors import ConfigError
from mmv1.log import configure_logging, logger

_API_KEY_VARIABLE = "MMV1_API_KEY"
_SECRET = ("api_key", "redis_url")
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("Server")
    server.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0: any free one (default: 8000)")
    server.add_argument("--root-path", default="", metavar="PATH", help="what a proxy in front has put before all paths")
    server.add_argument("--ssl-keyfile", metavar="FILE", help="serve https: the private key")
    server.add_argument("--ssl-certfile", metavar="FILE", help="serve https: the certificate, with those between it and its root")
    server.add_argument(
        "--uvicorn-log-level", default="warning", choices=_LOG_LEVELS, help="of the HTTP server's own messages (default: warning)"
    )
    _add_embedding_arguments(parser.add_argument_group("Embeddings"))
    _add_access_arguments(parser.add_argument_group("Access"))
    _add_limit_arguments(parser.add_argument_group("Limits"))


def _add_embedding_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--embedding-model", metavar="NAME:WEIGHTS", help="open_clip's, for /v1/embeddings; WEIGHTS: a tag or a file")
    add(
        "--runner", choices=("generate", "pooling"), default="generate",
        help="pooling: serve the embedding model only, and no language model (default: generate)",
    )  # fmt: skip
    size = DEFAULT_CACHE_BYTES
    add("--embedding-cache-bytes", type=int, default=size, metavar="N", help=f"of pictures' embeddings kept (default: {size})")


def _add_access_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--api-key", nargs="+", default=[], metavar="KEY", help="answer only who sends one of these keys; each is a tenant, and "
        f"tenants share no cache (default: those in {_API_KEY_VARIABLE}, between spaces; without any, everybody is answered)"
    )  # fmt: skip
    add("--allowed-origins", type=json_list, default=(), metavar="JSON", help="pages that may read answers: their origins, or *")
    add("--allowed-methods", type=json_list, default=("*",), metavar="JSON", help='methods they may use (default: ["*"])')
    add("--allowed-headers", type=json_list, default=("*",), metavar="JSON", help='headers they may send (default: ["*"])')
    add("--allow-credentials", action="store_true", help="let them send cookies and the like")


def _add_limit_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    size, timeout = DEFAULT_MAX_REQUEST_BYTES, DEFAULT_SHUTDOWN_TIMEOUT_S
    add("--max-request-bytes", type=int, default=size, metavar="N", help=f"largest body of a request (default: {size})")
    add("--max-queued-requests", type=int, metavar="N", help="requests that may wait for a first token; further ones get 429")
    add("--max-queued-requests-per-key", type=int, metavar="N", help="the same for each API key")
    add(
        "--shutdown-timeout", type=float, default=timeout, metavar="X",
        help=f"seconds to finish answers in after a signal to end; a second one ends at once (default: {timeout:g})",
    )  # fmt: skip


def run(namespace: argparse.Namespace) -> int:
    started_at = time.monotonic()
    configure_logging("api")
    settings = server_settings(namespace)
    embedding = embedding_settings(namespace)
    config = resolve(namespace.engine_args) if namespace.runner == "generate" else resolve_preprocess(namespace.engine_args)
    if embedding is not None and isinstance(config, EngineConfig) and embedding.name == config.model.served_model_name:
        raise ConfigError(f"both models are named {embedding.name}: give the language model another --served-model-name")
    with _bind(namespace.host, namespace.port) as listener:
        _log_settings(namespace)
        return run_until_signal(_start_and_serve(config, embedding, settings, listener, started_at))


def embedding_settings(namespace: argparse.Namespace) -> EmbeddingSettings | None:
    """None: no embedding model. Raises ConfigError."""
    is_alone = namespace.runner == "pooling"
    args: EngineArgs = namespace.engine_args
    if namespace.embedding_model is None:
        if is_alone:
            raise ConfigError("--runner pooling serves an embedding model: name it with --embedding-model NAME:WEIGHTS")
        return None
    if is_alone and args.model:
        raise ConfigError(f"--runner pooling serves no language model: leave {args.model} out")
    name = args.served_model_name if is_alone else None
    return EmbeddingSettings(model=namespace.embedding_model, served_name=name, cache_bytes=namespace.embedding_cache_bytes)


def server_settings(namespace: argparse.Namespace) -> ServerSettings:
    """Takes the keys out of the environment: processes started later, decoders of strangers' pictures among them, do not get
    them. Raises ConfigError."""
    in_environment = os.environ.pop(_API_KEY_VARIABLE, "").split()
    settings = ServerSettings(
        api_keys=tuple(namespace.api_key or in_environment),
        root_path=namespace.root_path,
        allowed_origins=namespace.allowed_origins,
        allowed_methods=namespace.allowed_methods,
        allowed_headers=namespace.allowed_headers,
        allow_credentials=namespace.allow_credentials,
        max_request_bytes=namespace.max_request_bytes,
        max_queued_requests=namespace.max_queued_requests,
        max_queued_requests_per_key=namespace.max_queued_requests_per_key,
        shutdown_timeout_s=namespace.shutdown_timeout,
        uvicorn_log_level=namespace.uvicorn_log_level,
        ssl_keyfile=namespace.ssl_keyfile,
        ssl_certfile=namespace.ssl_certfile,
    )
    if settings.ssl_certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"--ssl-certfile and --ssl-keyfile cannot be used: {error.strerror or error}") from error
    return settings


def _log_settings(namespace: argparse.Namespace) -> None:
    """What differs from the defaults. Keys are secret, and the Redis URL may hold a password."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([])) | dataclasses.asdict(EngineArgs())
    given = {
        name: "..." if name in _SECRET else getattr(namespace, name)
        for name, default in defaults.items()
        if getattr(namespace, name) != default
    }
    logger.info("Non-default settings: %s", ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none")


def _bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, not yet listening: clients are refused until the engine can answer."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}; choose others with --host and --port") from error
    return listener


async def _start_and_serve(
    config: EngineConfig | PreprocessConfig,
    embedding: EmbeddingSettings | None,
    settings: ServerSettings,
    listener: socket.socket,
    started_at: float,
) -> int:
    """`config`: of the engine, or where there is none of pictures alone."""
    from mmv1.embedding.embedder import Embedder
    from mmv1.engine.async_llm import AsyncLLM

    llm = AsyncLLM(config) if isinstance(config, EngineConfig) else None
    embedder = None
    if embedding is not None:
        preprocess = config.preprocess if isinstance(config, EngineConfig) else config
        takes_images = llm is not None and llm.preprocessor.layout.takes_images
        embedder = Embedder(embedding, preprocess, llm.preprocessor.pictures if llm is not None and takes_images else None)
    # The web framework is imported while models are loaded.
    importing = asyncio.ensure_future(asyncio.to_thread(_import_server))
    async with contextlib.AsyncExitStack() as stack:
        if embedder is not None:
            stack.push_async_callback(embedder.close)
            await embedder.start()
            if has_cuda_device():  # what it takes of the device must be seen where the engine measures what is left
                await embedder.wait_ready()
        if llm is not None:
            await llm.start()
            stack.push_async_callback(llm.close)
        if embedder is not None:
            await embedder.wait_ready()
        server = await importing
        return await server.serve(llm, listener, started_at, settings, embedder)  # from here on the signals are its own


def _import_server() -> types.ModuleType:
    from mmv1.api import server

    return server
