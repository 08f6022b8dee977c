"""Checkpoints by name: publish, time to live, deletion, copies, and the archive of older SDKs."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
