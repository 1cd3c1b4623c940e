"""Reads docker/Dockerfile into stages of instructions, as far as ours goes. An instruction it does not know is an error."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKER = ROOT / "docker"

_STEPS = {"RUN", "COPY", "WORKDIR"}
_NOTES = {"EXPOSE", "USER", "ENTRYPOINT", "HEALTHCHECK"}


@dataclass
class Stage:
    """One FROM and what follows it. `steps` change its files, in order; `notes` say how a container of it is run."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, list[str], str]] = field(default_factory=list)  # instruction, its --flags, the rest
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def entrypoint(self) -> list[str]:
        return json.loads(self.notes["ENTRYPOINT"])

    @property
    def healthcheck(self) -> list[str]:
        """The command; `HEALTHCHECK --option=... CMD ["..."]`."""
        return json.loads(self.notes["HEALTHCHECK"].partition("CMD")[2])

    @property
    def workdir(self) -> str:
        return [rest for instruction, _, rest in self.steps if instruction == "WORKDIR"][-1]


def read_dockerfile(inherited: dict[str, str]) -> list[Stage]:
    """The stages, in order. `inherited`: the environment of the base image."""
    text = re.sub(r"\\\n", " ", "".join(line for line in (DOCKER / "Dockerfile").open() if not line.lstrip().startswith("#")))
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            stages.append(Stage(name=rest.partition(" AS ")[2], env=dict(inherited)))
        elif not stages:
            assert instruction == "ARG", line  # of the FROM lines; no stage sees it
        elif instruction == "ARG":
            name, _, value = rest.partition("=")
            stages[-1].args[name] = value
        elif instruction == "ENV":
            for assignment in shlex.split(rest):
                name, _, value = assignment.partition("=")
                stages[-1].env[name] = re.sub(r"\$(\w+)", lambda match: stages[-1].env[match[1]], value)
        elif instruction in _STEPS:
            words = rest.split()
            flags = [word for word in words if word.startswith("--")][: next(i for i, w in enumerate(words) if w[:2] != "--")]
            stages[-1].steps.append((instruction, flags, rest.removeprefix(" ".join(flags)).strip()))
        else:
            assert instruction in _NOTES, line
            stages[-1].notes[instruction] = rest
    return stages
