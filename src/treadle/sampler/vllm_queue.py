"""Whose sequence vLLM gets next, and which adapter versions lie in its places: accounting alone, no engine, no clock.

vLLM starts requests in the order in which they come and drops adapters as it likes. So it is given no more sequences
than it runs and no more versions than it has places for: it never has to choose. Invariants: no tenant holds more than
its share of the sequences; a version is not dropped while one of its sequences runs; a version is never loaded again
under an id that another one had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from enum import Enum, auto

from treadle.domain.ids import BlobKey, TenantId
from treadle.sampler.vllm_requests import VllmJob


class TurnQueue:
    """Jobs with sequences that wait: first in, first out within a tenant, tenants in turn."""

    def __init__(self) -> None:
        # The order of the keys is whose turn is next.
        self._by_tenant: dict[TenantId, dict[VllmJob, None]] = {}

    def keys(self) -> set[BlobKey | None]:
        """The weights that its jobs wait for."""
        return {job.key for jobs in self._by_tenant.values() for job in jobs}

    def add(self, job: VllmJob) -> None:
        """Queue a job behind its tenant's others."""
        self._by_tenant.setdefault(job.tenant_id, {})[job] = None

    def discard(self, job: VllmJob) -> None:
        """Take a job out, wherever it is, if it is there."""
        jobs = self._by_tenant.get(job.tenant_id, {})
        jobs.pop(job, None)
        if not jobs:
            self._by_tenant.pop(job.tenant_id, None)

    def in_turn(self, may_start: Callable[[TenantId], bool]) -> Iterator[VllmJob]:
        """The jobs of the tenants that may start one more sequence, whose turn it is first."""
        for tenant_id, jobs in list(self._by_tenant.items()):
            if may_start(tenant_id):
                yield from list(jobs)

    def served(self, tenant_id: TenantId) -> None:
        """Put a tenant that has been given something to the back of the round."""
        jobs = self._by_tenant.pop(tenant_id, None)
        if jobs is not None:
            self._by_tenant[tenant_id] = jobs


class PlaceState(Enum):
    LOADING = auto()
    READY = auto()


class Place:
    """One version in vLLM's memory. adapter_id: vLLM's number of it, never used before."""

    __slots__ = ("adapter_id", "key", "num_running", "state")

    def __init__(self, key: BlobKey, adapter_id: int) -> None:
        self.key = key
        self.adapter_id = adapter_id
        self.state = PlaceState.LOADING
        self.num_running = 0


class Places:
    """At most `capacity` versions. Ids are counted up from `first_id`."""

    def __init__(self, capacity: int, *, first_id: int) -> None:
        self._capacity = capacity
        self._next_id = first_id
        # Least recently used first.
        self._by_key: OrderedDict[BlobKey, Place] = OrderedDict()

    def find(self, key: BlobKey) -> Place | None:
        """The version's place, now the most recently used one."""
        place = self._by_key.get(key)
        if place is not None:
            self._by_key.move_to_end(key)
        return place

    def take(self, key: BlobKey, *, kept: Collection[BlobKey | None] = ()) -> tuple[Place, Place | None] | None:
        """A place for a version that has none, and the one that must be unloaded for it; None while there is none.

        kept: versions that are not dropped, though none of their sequences runs.
        """
        assert key not in self._by_key
        dropped = None
        if len(self._by_key) >= self._capacity:
            idle = (place for place in self._by_key.values() if _is_idle(place))
            dropped = next((place for place in idle if place.key not in kept), None)
            if dropped is None:
                return None
            del self._by_key[dropped.key]
        place = self._by_key[key] = Place(key, self._next_id)
        self._next_id += 1
        return place, dropped

    def give_up(self, place: Place) -> None:
        """The version could not be loaded."""
        assert place.num_running == 0
        del self._by_key[place.key]


def _is_idle(place: Place) -> bool:
    return place.state is PlaceState.READY and place.num_running == 0
