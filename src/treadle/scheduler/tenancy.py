"""Who lives where, for the loops of a pool's workers: each gets the lines of its own tenants, and lets go of others.

One reading of the queue serves every worker that waits for one. It refuses to know what is done with a line.
Invariant: a line is handed to a worker only if the reading began when its tenant lived there already, so that what
another worker has done of it is in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

from treadle.domain.ids import PoolName, TenantId
from treadle.domain.limits import MAX_HEAD_ROWS, MAX_HEADS_PER_MODEL
from treadle.scheduler.placement import Placement
from treadle.scheduler.sorting import Queues
from treadle.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# How often a worker's loop lets go of tenants that nobody knows any more.
FORGET_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Lines as they were read. is_cut: there was more than one reading holds. version: of the homes, before it."""

    queues: Queues
    is_cut: bool
    version: int = 0


class Tenancy:
    """See the module. monotonic: seconds that never go back."""

    def __init__(
        self, *, pool: PoolName, store: Store, monotonic: Callable[[], float], on_moved: Callable[[], None]
    ) -> None:
        """on_moved: whoever may have got a tenant should look."""
        self.placement = Placement()
        self._pool = pool
        self._store = store
        self._monotonic = monotonic
        self.on_moved = on_moved
        self._running: asyncio.Task[Reading] | None = None
        self._next: asyncio.Task[Reading] | None = None

    def of(self, slot: int) -> SlotTenancy:
        """One worker's part."""
        return SlotTenancy(self, slot)

    @property
    def now(self) -> float:
        return self._monotonic()

    def opened(self, slot: int) -> None:
        """A worker is wanted."""
        self.placement.open(slot, self.now)

    def came_up(self, slot: int) -> None:
        """It has loaded."""
        self.placement.up(slot, self.now)
        self.on_moved()

    def went_down(self, slot: int) -> None:
        """It is gone, and its loop with it."""
        self.placement.down(slot, self.now)
        self.on_moved()

    def is_leaving(self, slot: int) -> None:
        """It is not wanted any more."""
        self.placement.leave(slot, self.now)
        self.on_moved()

    def closed(self, slot: int) -> None:
        """It has ended."""
        self.placement.close(slot, self.now)
        self.on_moved()

    def released(self, tenant_id: TenantId, slot: int) -> None:
        """The worker holds nothing of the tenant any more."""
        self.placement.released(tenant_id, self.now)
        log.info(
            "tenant moved",
            pool=self._pool,
            tenant_id=tenant_id,
            from_slot=slot,
            to_slot=self.placement.home(tenant_id),
        )
        self.on_moved()

    async def read(self) -> Reading:
        """All lines of the pool, read behind this call; tenants without a home have got one, if there is any."""
        if self._next is None:
            self._next = asyncio.create_task(self._read_behind(self._running), name=f"heads {self._pool}")
            self._next.add_done_callback(_retrieve)
        return await asyncio.shield(self._next)

    async def close(self) -> None:
        """End what is being read; nobody waits for it any more."""
        tasks = [task for task in (self._running, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_behind(self, before: asyncio.Task[Reading] | None) -> Reading:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        version = self.placement.version
        rows = await self._store.requests.heads(self._pool, MAX_HEADS_PER_MODEL)
        queues = {line[0].model_id: line for line in rows if line and line[0].model_id is not None}
        num_told = self.placement.num_told
        self.placement.look({line[0].tenant_id for line in queues.values()}, self.now)
        if self.placement.num_told != num_told:
            self.on_moved()
        return Reading(queues, is_cut=sum(map(len, queues.values())) >= MAX_HEAD_ROWS, version=version)


class SlotTenancy:
    """What one worker's loop sees of it."""

    def __init__(self, tenancy: Tenancy, slot: int) -> None:
        self._tenancy = tenancy
        self._slot = slot
        self._forgot_at = tenancy.now

    async def read(self) -> Reading:
        """The lines of this worker's tenants."""
        reading = await self._tenancy.read()
        placement, slot = self._tenancy.placement, self._slot
        mine = {
            model_id: line
            for model_id, line in reading.queues.items()
            if placement.was_home(line[0].tenant_id, slot, reading.version)
        }
        return Reading(mine, reading.is_cut, reading.version)

    def leaving(self) -> list[TenantId]:
        """Tenants that should be let go of."""
        return self._tenancy.placement.moving_from(self._slot)

    def released(self, tenant_id: TenantId) -> None:
        """Nothing of this tenant is held or known here any more."""
        self._tenancy.released(tenant_id, self._slot)

    def forget(self, known: Callable[[], Collection[TenantId]]) -> None:
        """Now and then, let go of tenants that have been away for long. known: of whom runs are known here.

        To be called when no line is in hand.
        """
        now = self._tenancy.now
        if now < self._forgot_at + FORGET_EVERY_S:
            return
        self._forgot_at = now
        if self._tenancy.placement.forget(self._slot, known(), now):
            self._tenancy.on_moved()

    def answers_for(self, tenant_id: TenantId) -> bool:
        """Whether commands about the tenant's runs are this worker's; the first one's when nobody has them."""
        home = self._tenancy.placement.home(tenant_id)
        return self._slot == (self._tenancy.placement.first() if home is None else home)


def _retrieve(task: asyncio.Task[Reading]) -> None:
    """An error is for whoever still waits."""
    if not task.cancelled():
        task.exception()
