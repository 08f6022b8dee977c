"""Log events are one line each, and every metric is documented."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client import CollectorRegistry

from treadle.errors import InvalidRequest
from treadle.masking import masked
from treadle.telemetry.logs import configure_logging, get_logger, log_context
from treadle.telemetry.metrics import METRICS_CONTENT_TYPE, Metrics

SECRETS = (
    "tml-" + "Ab0_-" * 8,
    "tml-short",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
    "ms-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
    "hf_AbCdEfGhIjKlMnOpQrStUvWx",
)
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


@pytest.mark.parametrize("style", ["console", "json"])
def test_no_line_has_a_key_or_a_token(style: Literal["console", "json"]) -> None:
    """Wherever it comes from: an event's fields, a traceback, another library."""
    stream = io.StringIO()
    configure_logging(style=style, level="debug", stream=stream)
    for secret in SECRETS:
        try:
            raise RuntimeError(f"no {secret}")
        except RuntimeError as error:
            get_logger("treadle.x").error(f"failed {secret}", exc=error, path=f"/a/{secret}?b={secret}", a=secret)
        logging.getLogger("other").warning("GET %s", secret)
    text = stream.getvalue()
    assert [secret for secret in SECRETS if secret[5:] in text] == []
    assert text.count("***") >= 5 * len(SECRETS)


def test_masking_leaves_everything_else_alone() -> None:
    for text in ("keys start with 'tml-'", "tml:user:alice", "12 ms-ish", "a.b.c", "hf_hub", "eyJust a word", ""):
        assert masked(text) == text
    assert masked("X-API-Key 'tml-abc' is unknown") == "X-API-Key 'tml-***' is unknown"
    assert InvalidRequest("base model 'tml-abc' is not served").message == "base model 'tml-***' is not served"
    assert str(InvalidRequest("tml-abc")) == "tml-***"


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
    metrics = Metrics(CollectorRegistry())
    families = {family.name for family in metrics.registry.collect() if family.name.startswith("treadle_")}
    noted = {doc.names[0].removesuffix("_total").removesuffix("_bucket").removesuffix("_info") for doc in metrics.docs}
    assert families == noted
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [doc.names[0] for doc in metrics.docs if f"`{doc.names[0]}`" not in text] == []


def test_no_metric_can_grow_with_what_clients_choose() -> None:
    bounded = {
        *("pool", "work", "kind", "category", "state", "change", "base_model", "boundary", "part", "worker"),
        *("route", "status", "error", "reason", "until", "what", "version", "python"),
    }
    assert {label for doc in Metrics(CollectorRegistry()).docs for label in doc.labels} <= bounded


def test_gauges_are_refreshed_before_each_scrape() -> None:
    metrics = Metrics(CollectorRegistry())
    counts = iter((3, 5))
    end = metrics.on_scrape(lambda: metrics.store_pending_writes.set(next(counts)))
    assert b"treadle_store_pending_writes 3.0" in metrics.render()
    assert b"treadle_store_pending_writes 5.0" in metrics.render()
    end()
    assert b"treadle_store_pending_writes 5.0" in metrics.render()
