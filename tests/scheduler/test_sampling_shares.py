"""Which queued samples reach a sampler: no tenant's queue hides another's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from scheduler_support import PATIENCE_S, TENANT, Cluster, _sample_request

from treadle.domain.ids import RequestId, TenantId
from treadle.domain.plan import SampleWork
from treadle.executor.fake import FakeExecutor
from treadle.scheduler.samplers import MAX_HANDED_OVER, MAX_HANDED_OVER_PER_TENANT
from treadle.testing.builders import sample_op

NEWCOMER = TenantId("newcomer")


class Busy(FakeExecutor):
    """A sampler whose samples never end; it notes what it was handed."""

    handed: list[SampleWork]

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        self.handed = [*getattr(self, "handed", []), *samples]

    cancelled: list[RequestId]

    def cancel_samples(self, request_ids: Sequence[RequestId]) -> None:
        self.cancelled = [*getattr(self, "cancelled", []), *request_ids]


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


async def test_a_cancelled_sample_leaves_the_sampler_and_makes_room(cluster: Cluster) -> None:
    await cluster.crash()
    cluster.executors.clear()
    cluster.new_worker = Busy
    requests = [_sample_request(sample_op(seq_id)) for seq_id in range(1, MAX_HANDED_OVER_PER_TENANT + 2)]
    for request in requests:
        await cluster.store.requests.enqueue(request)
    cluster.start()
    first, last = requests[0].request_id, requests[-1].request_id
    async with asyncio.timeout(PATIENCE_S):
        while len(_handed(cluster)) < MAX_HANDED_OVER_PER_TENANT:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert last not in [work.request_id for work in _handed(cluster)], "the tenant has its share"
        await cluster.store.cycles.cancel_sample(first)
        while last not in [work.request_id for work in _handed(cluster)]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert isinstance(cluster.worker, Busy)
    assert cluster.worker.cancelled == [first]
    future = await cluster.store.requests.future(first)
    assert future is not None
    assert future.failure is not None
    assert future.failure.message == "this sample was cancelled"
