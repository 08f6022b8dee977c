"""The loss whitelist: built-in losses, traced ones, and named ones under review."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
