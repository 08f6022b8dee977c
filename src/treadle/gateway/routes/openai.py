"""Completions and chat in the form of the OpenAI API."""

from __future__ import annotations

from treadle.gateway.routing import Resource

router = Resource()
