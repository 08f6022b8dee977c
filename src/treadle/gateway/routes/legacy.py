"""What only older SDKs call."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
