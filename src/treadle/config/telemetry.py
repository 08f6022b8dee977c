"""What the server tells about itself beyond its log: traces. A section of the Settings tree."""

from __future__ import annotations

from pydantic import Field

from treadle.config.section import Section


class OtelSettings(Section):
    """Traces of requests and cycles for OpenTelemetry; needs the extra: pip install 'treadle[otel]'."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s?#@]+$", max_length=500)
    """Where a collector listens for OTLP over HTTP, like `http://127.0.0.1:4318`. Empty: no traces, and nothing of
    OpenTelemetry is imported. Headers for it are taken from OTEL_EXPORTER_OTLP_HEADERS."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of requests that are traced, the same ones on every server of equal settings."""
    service_name: str = Field(default="treadle", min_length=1, max_length=200)
    """What this service is called in traces."""
