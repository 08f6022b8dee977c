"""Tenants and organisations: who they are, what weight they have, whether they may do anything."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/admin/v1")
