"""`mmv1 serve`: from settings to a listening socket, an engine and the HTTP server over it."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import socket
import time
import types

from mmv1.cli.event_loop import run_until_signal
from mmv1.config import EngineArgs, EngineConfig, resolve
from mmv1.errors import ConfigError
from mmv1.log import configure_logging, logger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("Server")
    server.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0: any free one (default: 8000)")


def run(namespace: argparse.Namespace) -> int:
    started_at = time.monotonic()
    configure_logging("api")
    config = resolve(namespace.engine_args)
    with _bind(namespace.host, namespace.port) as listener:
        _log_settings(namespace.engine_args)
        return run_until_signal(_start_and_serve(config, listener, started_at))


def _log_settings(args: EngineArgs) -> None:
    """What differs from the defaults. The Redis URL may hold a password."""
    defaults = EngineArgs()
    given = {
        field.name: "..." if field.name == "redis_url" else getattr(args, field.name)
        for field in dataclasses.fields(args)
        if getattr(args, field.name) != getattr(defaults, field.name)
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


async def _start_and_serve(config: EngineConfig, listener: socket.socket, started_at: float) -> int:
    from mmv1.engine.async_llm import AsyncLLM

    llm = AsyncLLM(config)
    # The web framework is imported while the engine's process loads the model.
    importing = asyncio.ensure_future(asyncio.to_thread(_import_server))
    await llm.start()
    try:
        server = await importing
        return await server.serve(llm, listener, started_at)  # from here on the signals are its own
    finally:
        await llm.close()


def _import_server() -> types.ModuleType:
    from mmv1.api import server

    return server
