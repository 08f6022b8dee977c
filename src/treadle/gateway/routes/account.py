"""Who the caller is, what was used, and what was done: tokens, keys, billing, audit."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource("/api/v1")
