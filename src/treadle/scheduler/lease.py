"""Keeping the lease of a pool: acquire it, renew it in time, give it back.

Every write of a leader carries the lease's token and fails with Fenced once another holder has taken over. So a
database that is away for a while ends nobody's lead: only the row can say that somebody else has it.
"""

from __future__ import annotations

import asyncio

from treadle.domain.ids import PoolName
from treadle.domain.records import LeaseRecord
from treadle.errors import Fenced, StoreUnavailable
from treadle.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


async def acquire_lease(store: Store, pool: PoolName, *, holder: str, ttl_s: float) -> LeaseRecord:
    """The lease, waiting while another live holder has it."""
    while (lease := await store.leases.acquire(pool, holder, ttl_s)) is None:  # noqa: ASYNC110 (only the row tells when another process lets go)
        await asyncio.sleep(ttl_s / 3)
    log.info("lease acquired", pool=pool, token=lease.token)
    return lease


async def keep_lease(store: Store, lease: LeaseRecord, *, ttl_s: float) -> None:
    """Renew the lease every third of its life, for ever. Raises Fenced when it is lost."""
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            is_ours = await store.leases.renew(lease, ttl_s)
        except StoreUnavailable as error:
            log.warning("lease not renewed", pool=lease.pool, reason=error.message)
            continue
        if not is_ours:
            raise Fenced(f"the lease of pool {lease.pool} was taken by another leader")
