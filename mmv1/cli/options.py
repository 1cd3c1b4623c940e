"""Flags made from the fields of `config.EngineArgs`, and `--config`: a YAML file whose keys are a command's own flags.

What is on the command line goes before the file, the file before the defaults. Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from mmv1.config import EngineArgs
from mmv1.errors import ConfigError


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all flags; and takes no flag by a part of its name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def flags(self) -> dict[str, argparse.Action]:
        """Every setting but --help by its name without dashes: flags, and arguments that have a place instead."""
        found = {}
        for action in self._actions:
            spellings = [flag[2:] for flag in action.option_strings if flag.startswith("--")] or [action.dest]
            if isinstance(action, argparse.BooleanOptionalAction):
                spellings = [name for name in spellings if not name.startswith("no-")]
            found.update(dict.fromkeys(spellings, action))
        found.pop("help", None)
        return found


def nearest(word: str, known: Iterable[str]) -> str:
    """" (did you mean X?)" when something known is spelled much alike, else nothing."""
    found = difflib.get_close_matches(word, list(known), 1, 0.75)
    return f" (did you mean {found[0]}?)" if found else ""


def add_engine_args(parser: argparse.ArgumentParser, *, model_flag: str) -> None:
    """One flag per field of EngineArgs, spelled as vLLM's, under the field's heading. `model_flag`: "model" where the model is
    the first argument, else "--model"."""
    types_of, defaults = get_type_hints(EngineArgs), EngineArgs()
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(EngineArgs):
        heading = field.metadata["group"]
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        if field.name == "model":
            extra = {} if model_flag.startswith("-") else {"nargs": "?"}
            group.add_argument(model_flag, default="", help=field.metadata["help"], metavar="MODEL", **extra)
            continue
        default = getattr(defaults, field.name)
        shown = "" if default in (None, [], {}) else f" (default: {_spelled(default)})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            default=default,
            help=field.metadata["help"].replace("%", "%%") + shown,
            **_reading_of(types_of[field.name]),
        )


def engine_args(namespace: argparse.Namespace) -> EngineArgs:
    return EngineArgs(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(EngineArgs)})


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
        return {"type": json_object, "metavar": "JSON"}
    if get_origin(annotation) is list:
        return {"nargs": "+", "metavar": "NAME"}
    return {"type": annotation, "metavar": {int: "N", float: "X"}.get(annotation, "NAME")}


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"image\": 4}}'")
    return value


def json_list(text: str) -> tuple[str, ...]:
    """A JSON list of strings, as vLLM wants them where values may begin with anything."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of strings, such as '[\"https://example.org\"]'")
    return tuple(value)


# ---- --config ----


def apply_config_file(parser: Parser, argv: Sequence[str]) -> None:
    """Make what the file named by --config in `argv` says the parser's defaults. Raises ConfigError naming file and key."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # --config without a file: the parser itself will say so
        return
    if path is None:
        return
    flags = {name: action for name, action in parser.flags().items() if name != "config"}
    said: dict[argparse.Action, str] = {}
    for key, value in _read_yaml(path).items():
        name = str(key).replace("_", "-")
        action = flags.get(name)
        if action is None:
            raise ConfigError(f"{path}: '{key}' is no setting of {parser.prog}{nearest(name, flags)}")
        if value is not None:  # null: as if it were not there
            action.default, action.required = _value_of(action, value, f"{path}: {key}"), False
            said[action] = name
    for group in parser._mutually_exclusive_groups:
        _let_one_be_said([action for action in group._group_actions if action in said], group, said, path, argv)


def _let_one_be_said(
    in_file: list[argparse.Action], group: Any, names: dict[argparse.Action, str], path: str, argv: Sequence[str]
) -> None:
    """Of flags that exclude each other the command line's goes before the file's. Raises ConfigError for two in the file."""
    if len(in_file) > 1:
        raise ConfigError(f"{path}: {' and '.join(names[action] for action in in_file)} cannot be given together")
    spellings = {spelling for action in group._group_actions for spelling in action.option_strings}
    if any(word.partition("=")[0] in spellings for word in argv):
        for action in in_file:
            action.default = None


def _read_yaml(path: str) -> dict[Any, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is not YAML: {reason}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path} must hold settings, one a line, such as 'max-model-len: 4096'")
    return settings


_WORDS_OF_TYPE = {int: "a whole number", float: "a number", None: "text", str: "text", json_object: "a mapping"}


def _value_of(action: argparse.Action, value: Any, place: str) -> Any:
    """What the flag would have made of `value`. Raises ConfigError."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{place} must be true or false, not {value!r}")
        return value
    if action.type is json_list and isinstance(value, list):
        value = json.dumps(value)
    if action.nargs in ("+", "*"):
        if not isinstance(value, list):
            raise ConfigError(f"{place} must be a list, not {value!r}")
        return [_one_value(action, each, place) for each in value]
    return _one_value(action, value, place)


def _one_value(action: argparse.Action, value: Any, place: str) -> Any:
    takes_mapping = action.type is json_object
    wanted = _WORDS_OF_TYPE.get(action.type, "a value of this flag")  # type: ignore[arg-type]
    if isinstance(value, bool) or not isinstance(value, dict if takes_mapping else (str, int, float)):
        raise ConfigError(f"{place} must be {wanted}, not {value!r}")
    if takes_mapping:
        return value
    try:
        read = action.type(str(value)) if callable(action.type) else str(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{place}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{place} must be {wanted}, not {value!r}") from error
    if action.choices is not None and read not in action.choices:
        raise ConfigError(f"{place} must be one of {', '.join(map(str, action.choices))}, not {value!r}")
    return read
