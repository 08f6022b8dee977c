"""Log events are one line each, and every metric is documented."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from treadle.telemetry.logs import configure_logging, get_logger, log_context
from treadle.telemetry.metrics import METRICS_CONTENT_TYPE, Metrics

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Gives the root logger back what pytest had installed."""
    root, ours = logging.getLogger(), logging.getLogger("treadle")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], root.level, ours.level = before


def test_console_events_are_one_line_with_fields() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    get_logger("treadle.x").info("cycle finished", cycle=1, seconds=0.123456, note="two words", bad="a\nb", empty="")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('info    cycle finished cycle=1 seconds=0.1235 note="two words" bad="a\\nb" empty=""')


def test_json_events_carry_context_and_traceback() -> None:
    stream = io.StringIO()
    configure_logging(style="json", stream=stream)
    log = get_logger("treadle.x")
    with log_context(tenant="acme"), log_context(cycle=7):
        try:
            raise RuntimeError("boom")
        except RuntimeError as error:
            log.error("cycle failed", exc=error, path=Path("x"))
    log.info("after")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["level"], first["tenant"], first["cycle"]) == ("cycle failed", "error", "acme", 7)
    assert "RuntimeError: boom" in first["traceback"]
    assert first["path"] == "x"
    assert "tenant" not in second


def test_levels_are_ours_and_other_libraries_only_warn() -> None:
    stream = io.StringIO()
    configure_logging(level="debug", stream=stream)
    get_logger("treadle.x").debug("seen")
    logging.getLogger("other").info("unseen")
    logging.getLogger("other").warning("seen %s", "too")
    configure_logging(level="error", stream=stream)
    get_logger("treadle.x").warning("unseen")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "debug   seen" in lines[0]
    assert "warning seen too" in lines[1]


def test_metrics_are_rendered_for_prometheus() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.cycles.labels(pool="treadle/tiny").inc()
    metrics.cycle_seconds.labels(pool="treadle/tiny").observe(0.2)
    text = metrics.render().decode()
    assert 'treadle_cycles_total{pool="treadle/tiny"} 1.0' in text
    assert 'treadle_cycle_seconds_bucket{le="0.25",pool="treadle/tiny"} 1.0' in text
    assert METRICS_CONTENT_TYPE.startswith("text/plain")


def test_two_servers_in_one_process_do_not_share_metrics() -> None:
    one, other = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    one.cycles.labels(pool="p").inc()
    assert b"treadle_cycles_total{" not in other.render()


def test_every_metric_has_a_line_in_the_docs() -> None:
    names = {family.name for family in Metrics(CollectorRegistry()).registry.collect()}
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}" not in text} == set()
