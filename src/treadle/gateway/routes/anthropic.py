"""Messages in the form of the Anthropic API."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource()
