"""What leader and standby do while the database is away, or refuses one thing: they wait, say so once, and go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scheduler_support import PATIENCE_S, POOL, Cluster

from treadle.domain.ids import BlobKey, ModelId
from treadle.domain.records import FinishedRequest, LeaseRecord, RequestRecord
from treadle.errors import ServerError, StoreUnavailable
from treadle.scheduler import cycle_loop, pool, sampling_loop
from treadle.scheduler.holders import is_dead_here, this_process
from treadle.scheduler.lease import Standby
from treadle.testing.builders import pass_op, sample_op

RUN = ModelId("session:train:0")


async def test_an_outage_is_told_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cycle_loop, "ERROR_PAUSE_S", 0.0)
    await cluster.result(await cluster.create(RUN))
    real, num_tries = cluster.store.requests.heads, 0

    async def heads(*args: object) -> list[tuple[RequestRecord, ...]]:
        nonlocal num_tries
        num_tries += 1
        if num_tries <= 5:
            raise StoreUnavailable("locked")
        return await real(POOL)

    monkeypatch.setattr(cluster.store.requests, "heads", heads)
    with caplog.at_level(logging.WARNING):
        await cluster.run(pass_op(1, model_id=RUN))
    said = [record for record in caplog.records if "storage" in record.getMessage()]
    assert [record.getMessage().partition(":")[0] for record in said] == [
        "storage is away",
        "storage is back",
    ]
    assert not any(record.exc_info for record in caplog.records)


async def test_a_standby_does_not_spin_when_it_cannot_write(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a disk ran full and ended the leader before."""
    await cluster.drain()
    host, machine, pid, _, nonce = this_process().split(" ")
    dead = " ".join((host, machine, pid, "1", nonce))
    assert is_dead_here(dead)
    assert await cluster.store.leases.acquire(POOL, dead, 1000.0) is not None
    tries = []

    async def acquire(*args: object, **_more: object) -> None:
        tries.append(args)
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(cluster.store.leases, "acquire", acquire)
    standby = Standby(cluster.store, POOL, holder="me", ttl_s=1.0, on_report=lambda _report: None)
    waiting = asyncio.create_task(standby.lease())
    await asyncio.sleep(0.5)
    assert len(tries) == 1
    monkeypatch.undo()
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting is not None


async def test_a_sample_that_cannot_be_stored_fails_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_loop, "ERROR_PAUSE_S", 0.0)
    real = cluster.store.cycles.finish_samples

    async def finish_samples(
        lease: LeaseRecord, finished: Sequence[FinishedRequest], **_: object
    ) -> tuple[BlobKey, ...]:
        if any(outcome.request_id.endswith(":2") and outcome.result for outcome in finished):
            raise ServerError("the database refused a statement")
        return await real(lease, finished)

    monkeypatch.setattr(cluster.store.cycles, "finish_samples", finish_samples)
    samples = [await cluster.submit_sample(sample_op(seq_id, seed=seq_id)) for seq_id in (1, 2, 3)]
    assert "could not be stored" in (await cluster.failure(samples[1])).message
    for request_id in (samples[0], samples[2]):
        await cluster.result(request_id)


async def test_a_report_that_was_refused_is_made_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every other server would show for ever what the pool was before."""
    monkeypatch.setattr(pool, "PUBLISH_PAUSE_S", 0.0)
    await cluster.result(await cluster.create(RUN))
    real, errors = cluster.store.pools.publish, [ServerError("the database refused a statement")]
    published = asyncio.Event()

    async def publish(*args: object, **more: object) -> None:
        if errors:
            raise errors.pop()
        await real(*args, **more)  # type: ignore[arg-type]
        published.set()

    monkeypatch.setattr(cluster.store.pools, "publish", publish)
    cluster.runner._set_status(cluster.runner.status.facts, reason="a test")
    async with asyncio.timeout(PATIENCE_S):
        await published.wait()
    assert not errors
    assert (await cluster.store.pools.report(POOL)).reason == "a test"


async def test_a_restarted_server_knows_its_base_model_before_it_is_loaded(cluster: Cluster) -> None:
    """So that a gateway admits requests at once; SDKs wait for a new run's admission for a minute only."""
    await cluster.result(await cluster.create(RUN))
    facts = cluster.runner.status.facts
    assert facts is not None
    await cluster.crash()
    elsewhere = replace(cluster.runner.status, facts=None)
    for source_dir, expected in ((facts.source_dir, facts), ("/another/model", None)):
        runner = cluster._new_runner()
        await runner.recall(source_dir)
        waits = replace(elsewhere, is_ready=False, reason="waiting for the lease", num_workers=0)
        assert runner.status == replace(waits, facts=expected)
        assert not runner.served.is_set()
