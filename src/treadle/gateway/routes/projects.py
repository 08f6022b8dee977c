"""Shared projects: their members read each other's runs and checkpoints in them."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
