"""The hourly bill of storage, written by the sweeps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from treadle.blobs import LocalBlobs
from treadle.config.tree import RetentionSettings
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, PoolName, SessionId, TenantId
from treadle.domain.ops import LoraSpec, OpKind
from treadle.domain.records import CheckpointRecord, FinishedCycle, ModelRecord, NewRequest, SessionRecord
from treadle.domain.states import ModelState, SessionState
from treadle.domain.usage import HOUR_S, SETTLED_AFTER_S, UsageKind, hour_of
from treadle.scheduler.sweeps import Sweeper
from treadle.store import Store
from treadle.telemetry.metrics import Metrics
from treadle.testing.clock import ManualClock

TENANT, SESSION, MODEL, POOL = TenantId("user:ada"), SessionId("s"), ModelId("s:train:0"), PoolName("base")
FOREVER = 2**40


@pytest.fixture
def clock() -> ManualClock:
    clock = ManualClock()
    # On the hour, so that hours are easy to count.
    clock.advance(HOUR_S - (clock.now() - hour_of(clock.now())))
    return clock


@pytest.fixture
async def store(sqlite_url: str, clock: ManualClock) -> AsyncIterator[Store]:
    store = await Store.open(sqlite_url, clock=clock.now)
    now = clock.now()
    await store.sessions.create(SessionRecord(SESSION, TENANT, SessionState.ACTIVE, now, now))
    lora = LoraSpec(rank=8, seed=1)
    run = ModelRecord(MODEL, SESSION, TENANT, POOL, "base", "r", lora, ModelState.READY, 1, now, now)
    request = NewRequest(
        request_id="s:train:0:0",  # type: ignore[arg-type]
        tenant_id=TENANT,
        pool=POOL,
        kind=OpKind.CREATE_MODEL,
        seq_id=0,
        num_tokens=0,
        model_id=MODEL,
    )
    await store.models.create(run, request)
    yield store
    await store.close()


def sweeper_of(store: Store, clock: ManualClock, directory: Path) -> Sweeper:
    return Sweeper(
        store=store,
        blobs=LocalBlobs(directory),
        pools=(),
        settings=RetentionSettings(session_silence_s=1e9),
        clock=clock.now,
        metrics=Metrics(CollectorRegistry()),
    )


async def save(store: Store, clock: ManualClock, name: str) -> None:
    record = CheckpointRecord(
        model_id=MODEL,
        tenant_id=TENANT,
        kind=CheckpointKind.TRAINING,
        name=name,
        tinker_path=f"tinker://{MODEL}/weights/{name}",
        blob_key=BlobKey(name),
        size_bytes=100,
        seq_id=1,
        created_at=clock.now(),
        base_model="base",
        lora=LoraSpec(rank=8, seed=1),
    )
    lease = await store.leases.acquire(POOL, "test", 1e9)
    assert lease is not None
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(replace(record),)))


async def stored(store: Store, clock: ManualClock) -> list[tuple[int, float]]:
    """Hours from now on, and the byte-seconds of each."""
    records = await store.usage.events(TENANT, since=0, before=FOREVER) or []
    assert all(record.kind is UsageKind.STORAGE for record in records)
    return [(round((record.bucket_start - clock.now()) / HOUR_S), record.amount) for record in records]


async def test_hours_are_written_when_they_are_over_and_those_of_a_pause_too(
    store: Store, clock: ManualClock, tmp_path: Path
) -> None:
    sweeper = sweeper_of(store, clock, tmp_path)
    await save(store, clock, "a")
    await sweeper.sweep()
    clock.advance(HOUR_S - 1)
    await sweeper.sweep()
    assert await stored(store, clock) == []

    clock.advance(SETTLED_AFTER_S)
    await sweeper.sweep()
    assert await stored(store, clock) == []

    clock.advance(1)
    await sweeper.sweep()
    await sweeper.sweep()
    assert await stored(store, clock) == [(-1, 100.0 * HOUR_S)]

    clock.advance(3 * HOUR_S)
    await sweeper.sweep()
    assert await stored(store, clock) == [(hour, 100.0 * HOUR_S) for hour in (-4, -3, -2, -1)]


async def test_two_servers_and_a_restart_write_each_hour_once(store: Store, clock: ManualClock, tmp_path: Path) -> None:
    await save(store, clock, "a")
    one, two = sweeper_of(store, clock, tmp_path / "one"), sweeper_of(store, clock, tmp_path / "two")
    for sweeper in (one, two):
        await sweeper.sweep()
    clock.advance(2 * HOUR_S + SETTLED_AFTER_S)

    for sweeper in (one, two, sweeper_of(store, clock, tmp_path / "three")):
        await sweeper.sweep()

    assert await stored(store, clock) == [(-2, 100.0 * HOUR_S), (-1, 100.0 * HOUR_S)]
