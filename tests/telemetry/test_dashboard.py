"""Dashboard and alert rules parse as PromQL and name only metrics and labels that the servers have."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry

from treadle.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "treadle.json"
RULES = ROOT / "docker" / "prometheus" / "treadle.rules.yml"
# Labels that Prometheus adds, and metrics that are not ours.
ADDED = {"instance", "job", "le"}
OTHERS = {"up": set(), "process_resident_memory_bytes": set(), "process_cpu_seconds_total": set()}


def known() -> dict[str, set[str]]:
    """Labels of every series that a scrape can have, by its name."""
    metrics = Metrics(CollectorRegistry())
    scraped = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    assert {name for name in OTHERS if name != "up"} <= scraped
    return OTHERS | {name: set(doc.labels) for doc in metrics.docs for name in doc.names}


def expressions_of_dashboard() -> list[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def parsed(expression: str) -> promql_parser.Expr:
    """Grafana puts values in the place of its variables before Prometheus sees them."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$pool", ".*"))


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Every metric that the expression reads, and the labels that it asks for."""
    found: list[Any] = []
    promql_parser.walk(parsed(expression), lambda node: found.append(node))
    for node in found:
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name, {matcher.name for matcher in node.matchers.matchers}


def grouped(expression: str) -> set[str]:
    """Labels that the expression sums up by."""
    found: list[Any] = []
    promql_parser.walk(parsed(expression), lambda node: found.append(node))
    modifiers = [node.modifier for node in found if isinstance(node, promql_parser.AggregateExpr)]
    return {label for modifier in modifiers if modifier is not None for label in modifier.labels}


@pytest.mark.parametrize("source", ["dashboard", "rules"])
def test_every_expression_names_what_there_is(source: str) -> None:
    series = known()
    expressions = expressions_of_dashboard() if source == "dashboard" else [rule["expr"] for rule in rules()]
    assert len(expressions) >= 15
    for expression in expressions:
        read = list(selectors(expression))
        assert read, expression
        for name, labels in read:
            assert name in series, f"{name} in {expression}"
            assert labels <= series[name] | ADDED, f"{labels} of {name} in {expression}"
        of_all = set[str]().union(*(series[name] for name, _ in read)) | ADDED
        assert grouped(expression) <= of_all, expression


def test_an_expression_of_a_metric_that_is_gone_is_found() -> None:
    assert list(selectors('sum by (pool) (rate(treadle_gone_total{pool=~"$pool"}[$__rate_interval]))')) == [
        ("treadle_gone_total", {"pool"})
    ]
    assert "treadle_gone_total" not in known()
    assert grouped("histogram_quantile(0.5, sum by (le, shade) (rate(x_bucket[5m])))") == {"le", "shade"}


def test_every_metric_is_shown_or_alerts() -> None:
    """A metric that nobody looks at is work for nothing."""
    read = {
        name
        for source in (expressions_of_dashboard(), (rule["expr"] for rule in rules()))
        for one in source
        for name, _ in selectors(one)
    }
    # The one is a histogram whose mean says enough.
    unread = {doc.names[0] for doc in Metrics(CollectorRegistry()).docs if not read & set(doc.names)}
    assert unread == {"treadle_cycle_tokens_bucket"}


def test_the_dashboard_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    text = script(monkeypatch, "make_dashboard").text()
    assert DASHBOARD.read_text(encoding="utf-8") == text, "run scripts/make_dashboard.py"


def test_the_list_of_metrics_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == script(monkeypatch, "make_docs").metrics_page(), "run scripts/make_docs.py"


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    text = (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert f"`{rule['alert']}`" in text, rule["alert"]
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def test_prometheus_reads_the_rules_and_scrapes_with_a_key() -> None:
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text(encoding="utf-8"))
    assert config["rule_files"] == [f"/etc/prometheus/{RULES.name}"]
    [job] = config["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("treadle", "/metrics")
    assert job["authorization"]["type"] == "Bearer"
    assert "credentials" not in job["authorization"], "a key belongs into a file"


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of scripts/."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module(name)
