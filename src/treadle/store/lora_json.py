"""LoraSpec as a JSON column. It is stored and read whole, never searched, so it needs no columns of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from treadle.domain.ops import LoraSpec


def lora_to_json(lora: LoraSpec) -> dict[str, Any]:
    """All fields by name."""
    return asdict(lora)


def lora_from_json(fields: Mapping[str, Any]) -> LoraSpec:
    """The spec as written. A field this version does not know is an error: it would change the numbers."""
    return LoraSpec(**fields)
