"""What all workers of a pool share while this server leads it: cycle numbers, and the note of what is in flight.

The lease's row names every request that any worker was given and whose outcome is not committed, so that the next
leader suspects all of them. It refuses to know plans and workers.
What was in flight when the leader before ended runs while nothing else does: else no end of a leader would tell who
ended it. Invariant: of the numbers of a lead each is used once, and no note leaves out what another worker has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain

from treadle.domain.ids import RequestId
from treadle.domain.records import LeaseRecord
from treadle.scheduler.outages import Outages
from treadle.scheduler.quarantine import Quarantine, Suspicions
from treadle.store import Store
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)


class Lead:
    """One lease from its beginning to its end."""

    def __init__(self, store: Store, lease: LeaseRecord) -> None:
        self.lease = lease
        self.outages = Outages(lease.pool)
        self.suspicions = Suspicions()
        self._store = store
        self._cycle = lease.cycle
        self._notes: dict[str, Sequence[RequestId]] = {}
        self._has_predecessor = True
        self._taking_over = asyncio.Lock()
        self._num_cycles = self._num_waiting_alone = 0
        self._is_one_alone = False
        self._turn_ended = asyncio.Event()

    async def take_over(self, quarantine: Quarantine) -> None:
        """What the leader before had in flight may be what ended it. Read once, before any worker gets anything."""
        async with self._taking_over:
            if not self._has_predecessor:
                return
            in_flight = await self._store.leases.in_flight(self.lease.pool)
            quarantine.inherit(in_flight)
            self._has_predecessor = False
        if in_flight:
            num = len(set(in_flight))
            log.warning("requests were in flight when the last leader ended", pool=self.lease.pool, num=num)

    async def turn(self, request_ids: Collection[RequestId]) -> AbstractContextManager[None]:
        """Wait until a cycle of these may run and be committed, in this context."""
        is_alone = self._is_to_run_alone(request_ids)
        self._num_waiting_alone += is_alone
        try:
            while self._is_one_alone or (self._num_cycles if is_alone else self._num_waiting_alone):
                self._turn_ended.clear()
                await self._turn_ended.wait()
        finally:
            self._num_waiting_alone -= is_alone
            self._turn_ended.set()
        return self._turn(is_alone=is_alone)

    @contextmanager
    def _turn(self, *, is_alone: bool) -> Iterator[None]:
        self._num_cycles += 1
        self._is_one_alone = is_alone
        try:
            yield
        finally:
            self._num_cycles -= 1
            self._is_one_alone = False
            self._turn_ended.set()

    def _is_to_run_alone(self, request_ids: Collection[RequestId]) -> bool:
        return not self.suspicions.inherited.isdisjoint(request_ids)

    async def begin(self, slot: str, note: Sequence[RequestId]) -> int:
        """Note what a worker is about to get, beside what the others have: the number of its cycle. Raises Fenced."""
        assert not self._has_predecessor, "what was in flight is overwritten"
        self._cycle += 1
        cycle = self._cycle
        if self._is_to_run_alone(note):
            self._notes.clear()  # of workers that died
        self._notes[slot] = note
        # Writes are made in the order in which they were asked for, so the newest note is the last one written.
        await self._store.cycles.begin(self.lease, cycle, self._all())
        return cycle

    def others(self, slot: str) -> list[RequestId]:
        """What is in flight besides: a commit of this worker ends its own note."""
        self._notes.pop(slot, None)
        return self._all()

    def closed(self, slot: str) -> None:
        """There is no such worker any more."""
        self._notes.pop(slot, None)

    def _all(self) -> list[RequestId]:
        return list(chain.from_iterable(self._notes.values()))
