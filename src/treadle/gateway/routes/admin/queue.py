"""What waits and what runs: queue, slots, cycles."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
