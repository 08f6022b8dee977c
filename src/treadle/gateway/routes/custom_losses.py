"""Losses that clients traced, registered for a session."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
