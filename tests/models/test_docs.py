"""docs/adding-a-model.md has every family, with the length that its file has."""

from __future__ import annotations

import re
from pathlib import Path

from mmv1.models import registry

ROOT = Path(__file__).resolve().parents[2]


def rows() -> dict[str, tuple[int, str]]:
    """Lines and third column of each file of the page's tables."""
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    found = {}
    for names, counts, rest in re.findall(r"^\| ((?:`[\w/.]+\.py`(?:, )?)+) \| ([\d, ]+) \| ([^|]*)", page, re.M):
        for name, count in zip(re.findall(r"`(.+?)`", names), counts.split(", "), strict=True):
            found[name] = (int(count), rest)
    return found


def test_lengths_are_true_and_no_family_is_missing() -> None:
    models = ROOT / "mmv1" / "models"
    for name, (count, _) in rows().items():
        assert len((models / name).read_text().splitlines()) == count, name
    described = {architecture for _, rest in rows().values() for architecture in re.findall(r"`(\w+)`", rest)}
    assert set(registry._BUILDERS) <= described
    families = {f"{build.__module__.rpartition('.')[2]}.py" for build in registry._BUILDERS.values()}
    assert families <= set(rows())
