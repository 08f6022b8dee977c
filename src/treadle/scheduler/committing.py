"""The leader's commits, with patience: a database that is away for a moment must not cost anybody finished work.

It refuses to know what is committed. Invariant: blobs that nobody names any more go behind the commit that says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from treadle.blobs import BlobStore
from treadle.domain.policy import Policies
from treadle.domain.records import FinishedCycle
from treadle.errors import StoreUnavailable
from treadle.scheduler.lead import Lead
from treadle.scheduler.preparing import drop_blobs
from treadle.store import Store

# How long a commit is tried again while the database does not answer. Work that is done is worth waiting for: giving
# up costs every run of the cycle a replay of it.
COMMIT_PATIENCE_S = 60.0
COMMIT_PAUSE_S = 0.25


class Committer:
    """Commits one worker's cycles under one lease."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        lead: Lead,
        slot: str,
        policies: Callable[[], Policies] = Policies,
    ) -> None:
        self._policies = policies
        self._store = store
        self._blobs = blobs
        self._lead = lead
        self._slot = slot

    async def commit(self, finished: FinishedCycle) -> None:
        """Return once it is public. Raises Fenced, and StoreUnavailable when the database stays away.

        To commit again what may have been written after all changes nothing.
        """
        deadline = asyncio.get_running_loop().time() + COMMIT_PATIENCE_S
        while True:
            try:
                unused = await self._store.cycles.finish(
                    self._lead.lease,
                    finished,
                    policies=self._policies(),
                    still_in_flight=self._lead.others(self._slot),
                )
            except StoreUnavailable as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
                self._lead.outages.noticed(error)
                await asyncio.sleep(COMMIT_PAUSE_S)
            else:
                break
        self._lead.outages.over()
        await drop_blobs(self._blobs, unused)
