"""What a leader tells other servers of its worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scheduler_support import PATIENCE_S, POOL, TENANT, Cluster

from treadle.domain.ids import ModelId
from treadle.domain.plan import SampleWork
from treadle.executor.fake import FakeExecutor
from treadle.scheduler import slot_report
from treadle.store.slots import Slots, WorkerReport
from treadle.testing.builders import pass_op, sample_op, step_op

RUN = ModelId("session:train:0")


async def reported(cluster: Cluster, wanted: Slots) -> None:
    """Return once the leader of now has reported exactly this."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            lease = await cluster.store.leases.current(POOL)
            if lease is not None:
                report = await cluster.store.slots.report(lease)
                if report.reported_at is not None and replace(report.slots, workers=()) == wanted:
                    return
            await asyncio.sleep(0.02)


async def test_a_leader_reports_what_its_worker_holds(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_report, "REPORT_EVERY_S", 0.01)
    await cluster.crash()
    cluster.start()
    await reported(cluster, Slots([], {}))
    await cluster.result(await cluster.create(RUN))
    await cluster.run(pass_op(1, model_id=RUN), step_op(2))
    await reported(cluster, Slots([RUN], {}))
    lease = await cluster.store.leases.current(POOL)
    assert lease is not None
    [worker] = (await cluster.store.slots.report(lease)).slots.workers
    assert worker == WorkerReport("0", "both", "up", num_tenants=1, num_runs=1)

    await cluster.drain()
    assert await cluster.store.leases.current(POOL) is None
    cluster.start()
    # Another leader, whose worker holds nothing yet.
    await reported(cluster, Slots([], {}))


class BusyWorker(FakeExecutor):
    """Its sampler answers nothing."""

    def submit_samples(self, samples: Sequence[SampleWork]) -> None:
        pass


async def test_samples_that_the_sampler_has_are_counted_by_tenant(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_report, "REPORT_EVERY_S", 0.01)
    await cluster.crash()
    cluster.new_worker = BusyWorker
    cluster.start()
    for seq_id in (1, 2):
        await cluster.submit_sample(sample_op(seq_id))
    await reported(cluster, Slots([], {TENANT: 2}))
