"""What was done and used: the audit log, usage, CSV."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
