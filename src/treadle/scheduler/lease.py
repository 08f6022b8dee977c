"""Getting the lease of a pool, and noticing when it is lost. How it is kept alive is the store's part.

Every write of a leader carries the lease's token and fails with Fenced once another holder has taken over. So a
database that is away for a while ends nobody's lead: only the row can say that somebody else has it.
Invariant: a standby asks often enough to lead as soon as it may, and hints only make it sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from treadle.domain.ids import PoolName
from treadle.domain.records import LeaseRecord
from treadle.errors import Fenced, StoreUnavailable
from treadle.scheduler.holders import is_dead_here
from treadle.store import PoolReport, Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# How often a standby asks the database, and how often whether the leader's process lives, when that is this machine's.
_ASK_S = 1.0
_LOOK_S = 0.1


class Standby:
    """Waits for the lease of one pool, and shows meanwhile what its leader reports."""

    def __init__(
        self, store: Store, pool: PoolName, *, holder: str, ttl_s: float, on_report: Callable[[PoolReport], None]
    ) -> None:
        self._store = store
        self._pool = pool
        self._holder = holder
        self._ttl_s = ttl_s
        self._on_report = on_report
        self._changed = asyncio.Event()
        self._is_stopped = False
        # While the database was away no leader could renew: the one that lives goes first.
        self._not_before = 0.0

    def stop(self) -> None:
        """End `lease`, which then returns None. Idempotent."""
        self._is_stopped = True
        self._changed.set()

    def hold_off(self, pause_s: float) -> None:
        """Leave the lease to others for so long."""
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + pause_s)

    async def lease(self) -> LeaseRecord | None:
        """The lease, as soon as nobody else holds it; None once stopped. A database that is away is waited for."""
        unsubscribe = self._store.events.on_pool_changed(self._note_change)
        try:
            while not self._is_stopped:
                self._changed.clear()
                report = PoolReport(reason="the database does not answer")
                try:
                    report = await self._store.pools.report(self._pool)
                    if (lease := await self._taken(report)) is not None:
                        return lease
                except StoreUnavailable as error:
                    log.warning("standby cannot see its pool", pool=self._pool, reason=error.message)
                    self._not_before = asyncio.get_running_loop().time() + self._ttl_s
                self._on_report(report)
                await self._wait(report)
            return None
        finally:
            unsubscribe()

    async def _taken(self, report: PoolReport) -> LeaseRecord | None:
        dead = report.holder if is_dead_here(report.holder) else None
        is_free = report.holder in ("", self._holder)
        if dead is None and (not is_free or asyncio.get_running_loop().time() < self._not_before):
            return None
        lease = await self._store.leases.acquire(self._pool, self._holder, self._ttl_s, instead_of=dead)
        if lease is not None:
            log.info("lease acquired", pool=self._pool, token=lease.token, instead_of=dead or "")
        return lease

    def _note_change(self, pool: PoolName) -> None:
        if pool == self._pool:
            self._changed.set()

    async def _wait(self, report: PoolReport) -> None:
        """Until there may be news: a hint, the end of the lease, the end of its holder, or the time to ask again."""
        now = asyncio.get_running_loop().time
        # Not before: a lease that is about to end is most likely renewed.
        until = now() + (_ASK_S if report.expires_in_s <= 0 else min(_ASK_S, report.expires_in_s + _LOOK_S / 2))
        # Who was dead before has just been tried to be replaced.
        was_alive = not is_dead_here(report.holder)
        while not self._changed.is_set() and now() < until and not (was_alive and is_dead_here(report.holder)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_S, max(0.0, until - now()))):
                    await self._changed.wait()


async def keep_lease(store: Store, lease: LeaseRecord, *, ttl_s: float) -> None:
    """Keep the lease until this is cancelled. Raises Fenced when it is lost."""
    renewal = store.leases.keep(lease, ttl_s)
    try:
        await renewal.lost()
        raise Fenced(f"the lease of pool {lease.pool} was taken by another leader")
    finally:
        await renewal.stop()
