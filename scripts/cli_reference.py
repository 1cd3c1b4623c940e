"""Writes docs/cli.md from the commands' own flags: .venv/bin/python scripts/cli_reference.py"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from mmv1.cli.main import COMMANDS, make_parser
from mmv1.cli.options import Parser, add_engine_args

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """\
# The command line

Made by `scripts/cli_reference.py` from the commands' own flags; a test sees to it that they agree.

Flags have vLLM's names where vLLM has the same setting. Every command that starts an engine also takes the
[engine's flags](#flags-of-the-engine) and `--config FILE`.

**`--config FILE`** is a YAML file whose keys are flags of the command, with `-` or `_`; the command line goes before it.
A key that is no flag, or a value of the wrong type, is an error that names file and key.

```yaml
model: Qwen/Qwen2.5-VL-3B-Instruct
port: 8000
max-model-len: 16384
limit-mm-per-prompt: {image: 4}
enable-prefix-caching: true
```

**Exit status:** 0; 2 for settings or a question that cannot work, in one sentence; 1 for an engine that failed; 130 after Ctrl-C.
`mmv1 caption` and `mmv1 run-batch` end with 3 when the run is over but some pictures or requests have failed.

**Environment:** `REDIS_URL` (as `--redis-url`), `MMV1_API_KEY` (as `--api-key`), `MMV1_LOG_LEVEL` (DEBUG, INFO, WARNING, ERROR),
`CUDA_VISIBLE_DEVICES`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, and, for a server that is measured, `OPENAI_API_KEY`.
"""


def engine_parser() -> Parser:
    parser = Parser(prog="mmv1")
    add_engine_args(parser, model_flag="--model")
    return parser


def tables(parser: argparse.ArgumentParser, *, without: set[str]) -> Iterator[str]:
    """A table for each group of flags, less --help and those of the groups `without`."""
    for group in parser._action_groups:
        rows = [action for action in group._group_actions if action.dest not in ("help", "config")]
        if group.title in without or not rows:
            continue
        yield f"\n| {'' if group.title in ('options', 'positional arguments') else group.title} | |\n|---|---|\n"
        for action in rows:
            yield f"| {spelled(action)} | {meaning(action)} |\n"


def spelled(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = "" if action.nargs == 0 else f" {action.metavar or choices}"
    value += " ..." if action.nargs == "+" else ""
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


def meaning(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%").replace("|", "\\|")


def sections() -> Iterator[str]:
    yield HEAD
    engine_groups = {group.title or "" for group in engine_parser()._action_groups} - {"options", "positional arguments"}
    for name, command in COMMANDS.items():
        _, parser = make_parser([name])
        assert parser is not None
        yield f"\n## mmv1 {name}\n\n"
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:  # a command itself, not a family of them
            yield f"`mmv1 {name} {command.words} [flags]`: {command.help}.\n"
            yield "".join(tables(parser, without=engine_groups))
        for action in nested:
            for choice, inner in action.choices.items():
                yield f"`mmv1 {name} {choice} [flags]`: {(inner.description or '').lower()[:1]}{(inner.description or '')[1:]}\n"
                yield "".join(tables(inner, without=set()))
        if parser.epilog:
            yield f"\n{parser.epilog}\n"
    takers = ", ".join(f"`mmv1 {name}`" for name, command in COMMANDS.items() if command.model_flag)
    yield f"\n## Flags of the engine\n\nOf {takers}. The model is their first argument or `--model`.\n"
    yield "".join(tables(engine_parser(), without=set()))


def page() -> str:
    return "".join(sections())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
