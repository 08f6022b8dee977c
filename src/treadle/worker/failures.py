"""How an error inside a worker becomes a failed op, or one that has to be run again behind a restore."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.domain.outcome import Failure, RestoreEnd
from treadle.domain.states import Category
from treadle.errors import InvalidRequest, NotFound, StaleTag, TreadleError


@dataclass(frozen=True, slots=True)
class MustRestore(Failure):
    """Why an op did not start: the worker does not hold the state that it starts from. It is no failure of the op."""


def failure_of(error: TreadleError) -> Failure:
    """What a client is told about an error raised on purpose."""
    if isinstance(error, StaleTag):
        return must_restore(error.message)
    return Failure(message=error.message, category=Category(error.category))


def must_restore(message: str) -> MustRestore:
    """The state that an op starts from is not here, for this reason."""
    return MustRestore(message=message, category=Category.SERVER)


def internal_failure(what: str) -> Failure:
    """What a client is told about an error that is a bug of ours; the details are in the log only."""
    return Failure(
        message=f"internal error while running {what}; the server's log has the details", category=Category.SERVER
    )


def restore_end_of(error: Exception) -> RestoreEnd:
    """How a restore ended that raised this: a blob that is gone or damaged will never do, the rest may pass."""
    return RestoreEnd.UNREADABLE if isinstance(error, NotFound | InvalidRequest) else RestoreEnd.FAILED
