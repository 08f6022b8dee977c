"""How much of a contended clock a tenant is owed: three classes, so that an operator has a word and not a number."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from treadle.domain.ids import TenantId


class WeightClass(StrEnum):
    """INTERACTIVE: somebody sits and waits. STANDARD: whoever was given no class. BULK: whenever there is room."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BULK = "bulk"


# Shares of tokens while all classes wait; only their ratios count. Far enough apart to be felt, near enough that a bulk
# tenant beside one interactive one still gets a seventeenth of the clock.
DEFAULT_WEIGHTS: Final = {WeightClass.INTERACTIVE: 4.0, WeightClass.STANDARD: 1.0, WeightClass.BULK: 0.25}


def tenant_of_user(user: str) -> TenantId:
    """The tenant that all keys of `user` belong to."""
    return TenantId(f"user:{user}")
