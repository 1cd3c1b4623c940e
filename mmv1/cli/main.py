"""The `mmv1` command: which commands there are, and what becomes of their errors.

A command is a module with `add_arguments(parser)` and `run(namespace) -> exit status`, imported only when it is the one asked
for. Where a command starts an engine, the engine's flags and --config are added here, and `namespace.engine_args` has the result.

Exit status: 0, 2 for settings or a question that cannot work, 1 for an engine that failed, 130 after Ctrl-C. Commands that do
many things may have further ones.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import mmv1
from mmv1.cli.options import Parser, add_engine_args, apply_config_file, engine_args, nearest
from mmv1.errors import ConfigError, EngineError, RequestError


class Command(NamedTuple):
    """`words`: what must or may stand after it. `model_flag`: how the engine's model is named; None: there is no engine."""

    module: str
    help: str
    words: str
    model_flag: str | None = None


COMMANDS = {
    "serve": Command("mmv1.cli.serve", "answer OpenAI-style chat requests over HTTP", "[MODEL]", "model"),
    "run": Command("mmv1.cli.run", "answer one question about pictures, or none", '[MODEL] "QUESTION" [PICTURE ...]', "--model"),
    "caption": Command("mmv1.batch.caption", "caption many pictures", "SOURCE ...", "--model"),
    "run-batch": Command("mmv1.batch.run_batch", "answer the requests of an OpenAI batch file", "-i FILE -o FILE", "--model"),
    "bench": Command("mmv1.cli.bench", "measure a server", "WHAT"),
    "demo": Command("mmv1.cli.demo", "ask the small model that is included about two pictures", "[MODEL]", "model"),
}


def make_parser(argv: Sequence[str]) -> tuple[Parser, Parser | None]:
    """The parser for `argv`, and of it the part of the command that `argv` names. Raises ConfigError for a --config."""
    usage = "mmv1 COMMAND ...; what a command takes: mmv1 COMMAND --help"
    parser = Parser(prog="mmv1", usage=usage, description="A multimodal-first LLM serving engine.")
    parser.add_argument("--version", action="version", version=f"mmv1 {mmv1.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND ...", dest="command", prog="mmv1")
    asked = next((word for word in argv if not word.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        parser.error(f"there is no command {asked!r}{nearest(asked, COMMANDS)}")
    asked_parser = None
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            usage=f"mmv1 {name} {command.words} [flags]",
        )
        if name == asked:
            _fill(subparser, command, argv)
            asked_parser = subparser
    return parser, asked_parser


def _fill(parser: Parser, command: Command, argv: Sequence[str]) -> None:
    module = importlib.import_module(command.module)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    if command.model_flag is not None:
        parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line goes before it")
        add_engine_args(parser, model_flag=command.model_flag)
        apply_config_file(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except (ConfigError, RequestError) as error:
        print(f"mmv1: {error}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"mmv1: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone: as for any program that writes into a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Sequence[str]) -> int:
    parser, asked_parser = make_parser(argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        at_fault = asked_parser or parser
        hint = nearest(unknown[0].partition("=")[0], (f"--{name}" for name in at_fault.flags()))
        at_fault.error(f"unknown argument {unknown[0]}{hint}")
    if asked_parser is None:
        parser.error("no command is given")
    if COMMANDS[namespace.command].model_flag is not None:
        namespace.engine_args = engine_args(namespace)
    status: int = namespace.run(namespace)
    sys.stdout.flush()
    return status
