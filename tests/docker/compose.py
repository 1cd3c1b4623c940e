"""The compose files, read with the defaults of their variables."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.docker.dockerfile import DOCKER


def read_compose(name: str) -> dict[str, Any]:
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", (DOCKER / name).read_text())
    assert "${" not in text, "a variable without a default: `docker compose up` would ask for it"
    return yaml.safe_load(text)


BASE = read_compose("docker-compose.yml")
GPU = read_compose("docker-compose.gpu.yml")
SERVICES: dict[str, dict[str, Any]] = BASE["services"]
