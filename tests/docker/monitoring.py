"""The dashboard's queries, and whether a server has what they ask for."""

from __future__ import annotations

import json
import re
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from tests.docker.dockerfile import DOCKER

_OF_PROMETHEUS = {"instance", "job"}  # labels that a scrape adds


def dashboard_queries() -> dict[str, list[str]]:
    """By the panel's title. The variable's own query is among them."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "mmv1.json").read_text())
    queries = {panel["title"]: [target["expr"] for target in panel.get("targets", [])] for panel in dashboard["panels"]}
    for variable in dashboard["templating"]["list"]:
        queries[variable["name"]] = [variable["query"]["query"]]
    return queries


def unanswered(metrics: str) -> list[str]:
    """What the dashboard asks for and the text of /metrics has not: metrics, labels of one, and values of a label."""
    known: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            for label, value in sample.labels.items():
                known[sample.name][label].add(value)
    missing = []
    for title, queries in dashboard_queries().items():
        for query in queries:
            names = re.findall(r"mmv1:\w+", query)
            missing += [f"{title}: {name}" for name in names if name not in known]
            labels = {label for listed in re.findall(r"\bby \(([^)]*)\)", query) for label in re.split(r",\s*", listed)}
            labels |= set(re.findall(r"label_values\([^,]+, (\w+)\)", query))
            matched = re.findall(r'(\w+)(?:=|!=|=~|!~)"([^"]*)"', query)
            labels |= {label for label, _ in matched}
            missing += [
                f"{title}: {label} of {name}"
                for name in names for label in labels - _OF_PROMETHEUS if name in known and label not in known[name]
            ]  # fmt: skip
            missing += [
                f"{title}: {label}={value} of {name}"
                for name in names for label, value in matched if "$" not in value and label not in _OF_PROMETHEUS
                if name in known and value not in known[name][label]
            ]  # fmt: skip
    return missing
