"""Spans to an OpenTelemetry collector, over OTLP/HTTP. The only file that imports OpenTelemetry (the extra `otel`).

They are sent in batches by a thread of the library; a collector that is slow or away costs spans, never a request.
It refuses to know what spans mean. Headers for the collector (a token, say) are read by the library from
OTEL_EXPORTER_OTLP_HEADERS. Invariant: nothing here blocks the caller, but for `close`, and that not for longer than
CLOSE_S.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from treadle import __version__
from treadle.telemetry import tracing
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# One call of the collector may take so long, and so may the last one when the server stops.
CALL_S = 5.0
CLOSE_S = 5.0
# Spans that wait to be sent; beyond it new ones are dropped.
MAX_WAITING = 8_192
MAX_PER_CALL = 512
SEND_EVERY_S = 1.0

_PATH = "/v1/traces"
_KINDS = {tracing.SpanKind.SERVER: SpanKind.SERVER, tracing.SpanKind.INTERNAL: SpanKind.INTERNAL}
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class OtlpSink:
    """A sink for `start_tracing`. endpoint: of the collector, like http://127.0.0.1:4318."""

    def __init__(self, endpoint: str, *, service_name: str) -> None:
        self._resource = Resource(
            {
                "service.name": service_name,
                "service.version": __version__,
                "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            }
        )
        self._scope = InstrumentationScope("treadle", __version__)
        url = endpoint.rstrip("/")
        self._exporter = _ToldOnce(url if url.endswith(_PATH) else url + _PATH)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=MAX_WAITING,
            max_export_batch_size=MAX_PER_CALL,
            schedule_delay_millis=SEND_EVERY_S * 1000,
        )

    def __call__(self, span: tracing.Span) -> None:
        """Queue a span."""
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=_context(span.at),
                parent=None if span.parent is None else _context(span.parent),
                resource=self._resource,
                attributes=span.attributes,
                links=[Link(_context(at)) for at in span.links],
                kind=_KINDS[span.kind],
                status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
                start_time=_nanoseconds(span.began_at),
                end_time=_nanoseconds(max(span.began_at, span.ended_at)),
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Send what waits, for CLOSE_S at most."""
        closing = threading.Thread(target=self._processor.shutdown, name="treadle-otlp-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        # Ends the tries of a thread that was left behind.
        self._exporter.give_up()


class _ToldOnce(SpanExporter):
    """The library's exporter; an outage of the collector is logged when it begins and when it is over."""

    def __init__(self, url: str) -> None:
        # It writes a line for every try.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._url = url
        self._inner = OTLPSpanExporter(endpoint=url, timeout=CALL_S)
        self._num_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if self._num_lost == 0:
                log.warning("traces are lost: the collector does not take them", collector=self._url)
            self._num_lost += len(spans)
        elif self._num_lost:
            log.info("the collector takes traces again", collector=self._url, lost_spans=self._num_lost)
            self._num_lost = 0
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]  # untyped in opentelemetry-exporter-otlp-proto-http 1.45

    def give_up(self) -> None:
        """`shutdown`, whether it was called before or not."""
        self.shutdown()


def _context(at: tracing.SpanRef) -> SpanContext:
    return SpanContext(at.trace_id, at.span_id, is_remote=False, trace_flags=_SAMPLED)


def _nanoseconds(epoch_s: float) -> int:
    # Of a double, nanoseconds of this century are noise.
    return round(epoch_s * 1e6) * 1_000
