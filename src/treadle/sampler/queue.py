"""Who gets the next decode slot: tenants in turn, each in the order of its own requests.

It holds jobs that still want slots and knows nothing of models or caches.
Invariant: no tenant is given more than its share, and who was served last waits for all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from treadle.domain.ids import TenantId
from treadle.sampler.job import Job


class TenantQueue:
    """First in, first out within a tenant, round-robin between tenants."""

    def __init__(self) -> None:
        # The order of the keys is whose turn is next.
        self._by_tenant: dict[TenantId, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._by_tenant.values())

    @property
    def num_tenants(self) -> int:
        return len(self._by_tenant)

    def add(self, job: Job, *, first: bool = False) -> None:
        """Queue a job behind its tenant's others, or before them when it has been interrupted."""
        jobs = self._by_tenant.setdefault(job.tenant_id, deque())
        if first:
            jobs.appendleft(job)
        else:
            jobs.append(job)

    def remove(self, job: Job) -> None:
        """Take a job out, wherever it is. ValueError or KeyError is our bug: it must be queued."""
        jobs = self._by_tenant[job.tenant_id]
        jobs.remove(job)
        if not jobs:
            del self._by_tenant[job.tenant_id]

    def pick(self, num_held: Mapping[TenantId, int], share: int) -> Job | None:
        """The job whose turn it is, or None; it stays queued until `remove`.

        A tenant that holds `share` slots or more is passed over, so that a newcomer finds slots free.
        """
        for tenant_id, jobs in self._by_tenant.items():
            if num_held.get(tenant_id, 0) < share:
                return jobs[0]
        return None

    def served(self, tenant_id: TenantId) -> None:
        """Put a tenant that has been given something to the back of the round."""
        jobs = self._by_tenant.pop(tenant_id, None)
        if jobs is not None:
            self._by_tenant[tenant_id] = jobs
