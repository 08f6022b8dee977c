"""API keys of all users: create, list, change, revoke."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
