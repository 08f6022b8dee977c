"""Spans arrive at a real OTLP receiver as they were meant; without a collector, nothing of OpenTelemetry is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.config import OtelSettings, load_settings
from treadle.errors import ConfigError
from treadle.telemetry import otlp, tracing
from treadle.telemetry.collector import tracing_to
from treadle.telemetry.tracing import Span, SpanKind, SpanRef, emit, from_traceparent, request_trace, start_tracing
from treadle.testing.otlp_collector import attributes_of, collecting

THEIRS = SpanRef(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    assert not tracing.is_tracing()
    yield
    assert not tracing.is_tracing()


def test_a_collector_gets_spans_as_they_were() -> None:
    root = request_trace("session:train:0:7")
    cycle = tracing.cycle_trace("treadle/tiny", 3, 41)
    with collecting() as collector, tracing_to(OtelSettings(endpoint=collector.endpoint, service_name="mine")):
        emit(
            Span(
                "run",
                root.child("run"),
                began_at=1_700_000_000.25,
                ended_at=1_700_000_001.5,
                parent=root,
                kind=SpanKind.SERVER,
                attributes={"treadle.pool": "treadle/tiny", "treadle.tokens": 12, "share": 0.5, "is_replay": True},
                links=(cycle,),
                error="the worker ended",
            )
        )
        emit(Span("request", root, began_at=1.0, ended_at=0.5))
    run, request = collector.spans
    assert (run.name, request.name) == ("run", "request")
    assert run.trace_id == request.trace_id == root.trace_id.to_bytes(16, "big")
    assert run.parent_span_id == request.span_id == root.span_id.to_bytes(8, "big")
    assert request.parent_span_id == b""
    assert (run.start_time_unix_nano, run.end_time_unix_nano) == (1_700_000_000_250_000_000, 1_700_000_001_500_000_000)
    assert request.end_time_unix_nano == request.start_time_unix_nano, "clocks of two machines may disagree"
    assert run.kind == run.SPAN_KIND_SERVER
    assert attributes_of(run) == {
        "treadle.pool": "treadle/tiny",
        "treadle.tokens": 12,
        "share": 0.5,
        "is_replay": True,
    }
    [link] = run.links
    assert (link.trace_id, link.span_id) == (cycle.trace_id.to_bytes(16, "big"), cycle.span_id.to_bytes(8, "big"))
    assert (run.status.code, run.status.message) == (run.status.STATUS_CODE_ERROR, "the worker ended")
    assert request.status.code == request.status.STATUS_CODE_UNSET
    resource = {
        pair.key: pair.value.string_value for pair in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "mine"


def test_a_collector_that_is_away_costs_nobody_anything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "CALL_S", 0.2)
    monkeypatch.setattr(otlp, "CLOSE_S", 1.0)
    with collecting() as collector:
        endpoint = collector.endpoint
    with tracing_to(OtelSettings(endpoint=endpoint)):
        for number in range(2 * otlp.MAX_WAITING):
            emit(Span("x", request_trace(str(number)), began_at=1.0, ended_at=2.0))
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.message for record in warnings] == ["traces are lost: the collector does not take them"]


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    # FastAPI imports the bare API where that is installed.
    code = "import sys, treadle.server; print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', "
    code += "'opentelemetry.exporter', 'opentelemetry.proto', 'treadle.telemetry.otlp'))])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "treadle.telemetry.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"treadle\[otel\]"), tracing_to(OtelSettings(endpoint="http://127.0.0.1:1")):
        pass


def test_settings_take_a_collector_and_refuse_what_is_none() -> None:
    settings = load_settings(overrides={"otel.endpoint": "http://collector:4318", "otel.sample_ratio": 0.25})
    assert settings.otel.endpoint == "http://collector:4318"
    assert load_settings().otel.endpoint is None
    for bad in ("collector:4318", "http://user:secret@collector:4318", "http://collector:4318/?token=x"):
        with pytest.raises(ConfigError):
            load_settings(overrides={"otel.endpoint": bad})


@given(st.text(), st.text())
def test_a_request_has_one_trace_wherever_it_is_asked_for(one: str, other: str) -> None:
    assert request_trace(one) == request_trace(one)
    assert (request_trace(one) == request_trace(other)) == (one == other)
    assert request_trace(one).trace_id != tracing.cycle_trace(one, 1, 1).trace_id
    assert request_trace(one).child("run").trace_id == request_trace(one).trace_id
    assert request_trace(one).child("run") == request_trace(one).child("run") != request_trace(one).child("queued")


def test_a_ratio_takes_whole_traces_and_everybody_the_same() -> None:
    refs = [request_trace(f"session:train:0:{number}") for number in range(2_000)]
    seen: list[Span] = []
    end = start_tracing(seen.append, sample_ratio=0.25)
    for ref in refs:
        emit(Span("request", ref, began_at=1.0, ended_at=2.0))
        emit(Span("run", ref.child("run"), began_at=1.0, ended_at=2.0, parent=ref))
    end()
    taken = {span.at.trace_id for span in seen}
    assert len(seen) == 2 * len(taken), "all spans of a trace or none"
    assert 400 < len(taken) < 600
    assert taken == {ref.trace_id for ref in refs if (ref.trace_id & (2**64 - 1)) < 2**62}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", THEIRS),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00 ", THEIRS),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", None),
        ("x" * 10_000, None),
        ("", None),
        (None, None),
    ],
)
def test_what_a_client_says_of_its_trace_is_read_or_ignored(header: str | None, expected: SpanRef | None) -> None:
    assert from_traceparent(header) == expected
