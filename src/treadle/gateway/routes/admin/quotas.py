"""Quotas: what tenants may use, by scope."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
