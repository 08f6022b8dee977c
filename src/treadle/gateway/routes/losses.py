"""Losses as users see them: what is enabled, and submitting one of their own under a name."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
