"""Which queued samples reach a sampler: no tenant's queue hides another's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from scheduler_support import PATIENCE_S, TENANT, Cluster, _sample_request

from treadle.domain.ids import TenantId
from treadle.domain.plan import SampleWork
from treadle.executor.fake import FakeExecutor
from treadle.scheduler.sampling_loop import MAX_HANDED_OVER, MAX_HANDED_OVER_PER_TENANT
from treadle.testing.builders import sample_op

NEWCOMER = TenantId("newcomer")


class Busy(FakeExecutor):
    """A sampler whose samples never end; it notes what it was handed."""

    handed: list[SampleWork]

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        self.handed = [*getattr(self, "handed", []), *samples]


async def test_a_newcomers_sample_is_handed_over_beside_a_full_queue(cluster: Cluster) -> None:
    await cluster.crash()
    cluster.executors.clear()
    cluster.new_worker = Busy
    flood = [_sample_request(sample_op(seq_id)) for seq_id in range(1, MAX_HANDED_OVER + 50)]
    for request in flood:
        await cluster.store.requests.enqueue(request)
    cluster.start()
    newcomer = replace(_sample_request(sample_op(1_000)), tenant_id=NEWCOMER)
    await cluster.store.requests.enqueue(newcomer)
    async with asyncio.timeout(PATIENCE_S):
        while newcomer.request_id not in [work.request_id for work in _handed(cluster)]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert sum(work.tenant_id == TENANT for work in _handed(cluster)) == MAX_HANDED_OVER_PER_TENANT


def _handed(cluster: Cluster) -> list[SampleWork]:
    return getattr(cluster.worker, "handed", []) if cluster.executors else []
