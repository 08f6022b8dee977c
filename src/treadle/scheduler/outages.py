"""Telling an operator that the database, or the blobs, are away: once when it begins, once when it is over.

Everything that a leader does needs them, and tries again until it answers; without this each try would say so.
It refuses to know what is tried. Invariant: between two warnings of one pool something was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from treadle.domain.ids import PoolName
from treadle.errors import StoreUnavailable
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


class Outages:
    """The outages of one pool's leader, shared by everything that writes for it."""

    def __init__(self, pool: PoolName, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._monotonic = monotonic
        self._began_at: float | None = None

    def noticed(self, error: StoreUnavailable) -> None:
        """Something could not be read or written, and is tried again."""
        if self._began_at is None:
            self._began_at = self._monotonic()
            log.warning("storage is away: work waits for it", pool=self._pool, reason=error.message)

    def over(self) -> None:
        """Something was written."""
        if self._began_at is not None:
            seconds = self._monotonic() - self._began_at
            self._began_at = None
            log.warning("storage is back", pool=self._pool, seconds=round(seconds, 1))
