"""Turns traces on for as long as a server serves, when the settings name a collector.

It refuses to know what is traced. Invariant: without a collector nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from treadle.config import OtelSettings
from treadle.errors import ConfigError
from treadle.telemetry.logs import get_logger
from treadle.telemetry.tracing import start_tracing

log = get_logger(__name__)


@contextmanager
def tracing_to(settings: OtelSettings) -> Iterator[None]:
    """Give spans made inside to the collector of the settings. Raises ConfigError when the extra is not installed."""
    if settings.endpoint is None:
        yield
        return
    try:
        # Here and not above: it takes a third of a second, and is not installed everywhere.
        from treadle.telemetry.otlp import OtlpSink
    except ModuleNotFoundError as error:
        raise ConfigError("otel.endpoint needs its extra: pip install 'treadle[otel]'") from error
    sink = OtlpSink(settings.endpoint, service_name=settings.service_name)
    end = start_tracing(sink, sample_ratio=settings.sample_ratio)
    log.info("traces are sent", endpoint=settings.endpoint, sample_ratio=settings.sample_ratio)
    try:
        yield
    finally:
        end()
        sink.close()
