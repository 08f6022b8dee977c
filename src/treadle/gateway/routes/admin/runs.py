"""Training runs of all tenants: inspect, snapshot, evict."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
