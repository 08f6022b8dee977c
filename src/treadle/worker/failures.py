"""How an error inside a worker becomes a failed op."""

from __future__ import annotations

from treadle.domain.outcome import Failure
from treadle.domain.states import Category
from treadle.errors import TreadleError


def failure_of(error: TreadleError) -> Failure:
    """What a client is told about an error raised on purpose."""
    return Failure(message=error.message, category=Category(error.category))


def internal_failure(what: str) -> Failure:
    """What a client is told about an error that is a bug of ours; the details are in the log only."""
    return Failure(
        message=f"internal error while running {what}; the server's log has the details", category=Category.SERVER
    )
