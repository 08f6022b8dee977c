"""What shared projects let a tenant read of others, remembered for a moment.

The store numbers the changes that end a sharing; while that number stays, what was shared still is, so that one small
read a second confirms everything that is remembered. It refuses to know what is read.
Invariant: what is remembered was read after the number that it is remembered under, and is forgotten with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from treadle.domain.ids import SessionId, TenantId
from treadle.gateway.caches import ConfirmedRows
from treadle.gateway.deps import Clock
from treadle.store import Store

# Another gateway may end a membership; until then what it shared is read for at most this long.
SHARING_CACHE_S = 1.0
# Who reads which session, least recently used first out.
MAX_CACHED_READINGS = 8_192

# Who reads, and what of others.
Reading = tuple[TenantId, SessionId]


class Sharing:
    """See the module."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._readings = self._fresh(version=None)

    async def is_shared(self, reader: TenantId, session_id: SessionId) -> bool:
        """Whether a project shares this session, which is not the reader's, with the reader now."""
        if await self._readings.get((reader, session_id)) is not None:
            return True
        # What is read now belongs to what was known before: a change meanwhile begins anew.
        readings, read_at = self._readings, self._clock.monotonic()
        if not await self._store.projects.shares(session_id, reader=reader):
            return False
        readings.put((reader, session_id), True, read_at=read_at)
        return True

    def changed(self) -> None:
        """This gateway just changed who shares what: nothing that is remembered counts any more."""
        self._readings = self._fresh(version=None)

    def _fresh(self, *, version: tuple[int, int] | None) -> ConfirmedRows[Reading, bool]:
        """Nothing yet, under this number; None for one that is not known, and so will not be confirmed."""

        async def ended(readings: Sequence[Reading]) -> Collection[Reading]:
            now = await self._store.projects.sharing_version()
            if now == version:
                return ()
            if self._readings is fresh:
                self._readings = self._fresh(version=now)
            return readings

        fresh: ConfirmedRows[Reading, bool] = ConfirmedRows(
            capacity=MAX_CACHED_READINGS, lifetime_s=SHARING_CACHE_S, clock=self._clock, ended=ended
        )
        return fresh
