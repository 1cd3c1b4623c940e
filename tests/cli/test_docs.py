"""What the pages say of the command line is so: the reference is made of the flags, and every command line shown can be read."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmv1.cli.main import COMMANDS, make_parser
from mmv1.config import DEMO_MODEL
from tests.cli.command import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "demo_model").glob("*.md")])
_COMMAND = re.compile(r"(?:^|&& |\$ )(?:[A-Z_]+=\S+ )*mmv1 (?P<words>.*)")
_INLINE = re.compile(r"`mmv1 ([^`]*)`")


def commands_of(page: Path) -> Iterator[str]:
    """Command lines in blocks, with what the shell would leave of them, and those inside sentences."""
    text = page.read_text()
    for number, block in enumerate(text.split("```")):
        if number % 2:
            joined = block.replace("\\\n", " ")
            yield from (match["words"] for line in joined.splitlines() if (match := _COMMAND.match(line.strip())))
        else:
            yield from _INLINE.findall(block)


def words_of(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&<>")
    lexer.whitespace_split = True
    words = list(lexer)  # comments are left out
    ends = [number for number, word in enumerate(words) if set(word) <= set("|&<>")]
    return words[: min(ends, default=len(words))]


def test_the_reference_is_made_of_the_flags() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "cli_reference.py"))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run scripts/cli_reference.py"


def test_requests_shown_are_for_models_that_the_servers_shown_have() -> None:
    for page in PAGES:
        assert {*re.findall(r'"model": "(.*?)"', page.read_text())} <= {DEMO_MODEL, "ViT-B-32"}, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_shown_can_be_read(page: Path) -> None:
    for line in commands_of(page):
        argv = words_of(line)
        if not argv or argv[0].isupper() or any(word in line for word in ("...", "[", "|")):
            continue  # a form, not a command line
        assert argv[0] in COMMANDS or argv[0].startswith("-"), line
        if "--config" in argv:  # whose file is not here
            place = argv.index("--config")
            del argv[place : place + 2]
        parser, asked = make_parser(argv)
        if asked is None or len(argv) == 1:  # a name alone, in a sentence
            continue
        known = {f"--{name}" for name in asked.flags()} | {f"--no-{name}" for name in asked.flags()} | {"--help"}
        if argv[0] != "bench":
            assert {word.partition("=")[0] for word in argv if word.startswith("--")} <= known, line
        if argv[1].startswith("--") and len(argv) == 2:  # a flag's name, in a sentence
            continue
        try:
            parser.parse_args(argv)
        except SystemExit as end:
            assert end.code == 0, f"{page.name} shows what cannot be read: mmv1 {line}"


def test_pages_with_something_wrong_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    blocks = ("```\nmmv1 serve --max-modellen 4\n```", "```\nX=1 mmv1 sevre m\n```")
    for text in (*blocks, "`mmv1 run --token 5`", "`mmv1 run a --seed x`"):
        page.write_text(text)
        with pytest.raises((AssertionError, SystemExit)):
            test_every_command_line_shown_can_be_read(page)
    block = "```\nmmv1 serve m --port 1 --no-enable-prefix-caching   # why\nmmv1 run 'a b' c.jpg > out\n```\n"
    page.write_text(block + "`mmv1 serve --help`")
    test_every_command_line_shown_can_be_read(page)
