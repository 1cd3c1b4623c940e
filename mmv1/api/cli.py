"""The `mmv1` command. Its options are made from the fields of `config.EngineArgs`; nothing heavy is imported to parse them."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import socket
import sys
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import mmv1
from mmv1.config import EngineArgs, EngineConfig, resolve
from mmv1.errors import ConfigError, EngineError


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """One option per field of EngineArgs, spelled as vLLM's, under the field's heading."""
    types_of, defaults = get_type_hints(EngineArgs), EngineArgs()
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(EngineArgs):
        heading = field.metadata["group"]
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        if field.metadata.get("positional"):
            group.add_argument(field.name, nargs="?", default="", help=field.metadata["help"])
            continue
        default = getattr(defaults, field.name)
        shown = "" if default in (None, [], {}) else f" (default: {_spelled(default)})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            default=default,
            help=field.metadata["help"].replace("%", "%%") + shown,
            **_reading_of(types_of[field.name]),
        )


def _spelled(default: Any) -> str:
    return ("off", "on")[default] if isinstance(default, bool) else str(default)


def _reading_of(annotation: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (member for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is dict:
        return {"type": _counts, "metavar": "JSON"}
    if get_origin(annotation) is list:
        return {"nargs": "+", "metavar": "NAME"}
    return {"type": annotation, "metavar": {int: "N", float: "X"}.get(annotation, "NAME")}


def _counts(text: str) -> dict[str, int]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(type(count) is int and count >= 0 for count in value.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of counts, such as '{{\"image\": 4}}'")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmv1", description="A multimodal-first LLM serving engine.")
    parser.add_argument("--version", action="version", version=f"mmv1 {mmv1.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser("serve", help="answer OpenAI-style chat requests over HTTP")
    server = serve.add_argument_group("Server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0: any free one (default: 8000)")
    add_engine_args(serve)
    serve.set_defaults(run=_serve)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for settings that cannot work, 1 for an engine that failed."""
    namespace = make_parser().parse_args(argv)
    try:
        return namespace.run(namespace)
    except (ConfigError, EngineError) as error:
        print(f"mmv1: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _engine_args(namespace: argparse.Namespace) -> EngineArgs:
    return EngineArgs(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(EngineArgs)})


def _bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, not yet listening: clients are refused until the engine can answer."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}") from error
    return listener


def _serve(namespace: argparse.Namespace) -> int:
    import uvloop

    from mmv1.log import configure_logging

    configure_logging("api")
    config = resolve(_engine_args(namespace))
    with _bind(namespace.host, namespace.port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_start_and_serve(config, listener))
        except (asyncio.CancelledError, KeyboardInterrupt):  # a signal during the start
            return 130


async def _start_and_serve(config: EngineConfig, listener: socket.socket) -> int:
    from mmv1.engine.async_llm import AsyncLLM

    this_task = asyncio.current_task()
    if this_task is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, this_task.cancel)
    llm = AsyncLLM(config)
    # The web framework is imported while the engine's process loads the model.
    importing = asyncio.ensure_future(asyncio.to_thread(_import_server))
    await llm.start()
    try:
        server = await importing
        return await server.serve(llm, listener)
    finally:
        await llm.close()


def _import_server() -> types.ModuleType:
    from mmv1.api import server

    return server
