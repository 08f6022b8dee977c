"""The OpenAPI document."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource()
