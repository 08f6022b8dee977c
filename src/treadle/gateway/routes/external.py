"""Weights for use elsewhere: saved as a PEFT directory, fetched by signed URLs."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
