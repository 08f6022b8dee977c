"""Pools and their models: add, pause, resume, drain, remove."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
