"""The sweeps on a real store and real files: what goes, what stays, and that they may meet anything half-way."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection, Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from scheduler_support import POOL, SESSION, TENANT, Cluster

from treadle.blobs import BlobStore, open_blobs
from treadle.config.tree import RetentionSettings
from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, SamplingSessionId, TinkerPath, blob_folder
from treadle.domain.limits import CHECKPOINT_GRACE_S
from treadle.domain.ops import LoadWeightsOp, LoraSpec, SaveWeightsOp, UnloadModelOp
from treadle.domain.records import CheckpointRecord, FinishedCycle, LeaseRecord, SamplingSessionRecord
from treadle.domain.states import ModelState
from treadle.errors import StoreUnavailable
from treadle.scheduler.sweeps import Sweeper
from treadle.store import Store
from treadle.telemetry.metrics import Metrics
from treadle.testing.builders import pass_op, step_op
from treadle.testing.clock import ManualClock

MODEL = ModelId("session:train:0")
LORA = LoraSpec(rank=8, seed=7)
HOUR = 3600.0
# Where blobs of a session of this database lie.
OWN = f"states/{blob_folder(MODEL)}"


class FakePool:
    """Holds runs, and notes which it was told to put away."""

    def __init__(self, *resident: ModelId) -> None:
        self._resident = resident
        self.parked: list[ModelId] = []

    def resident_runs(self) -> Collection[ModelId]:
        return self._resident

    def park_cold(self, model_ids: Iterable[ModelId]) -> None:
        self.parked += model_ids


class Sweeping:
    """An idle cluster (rows are queued, no pool leads) and a sweeper over it."""

    def __init__(self, cluster: Cluster, *pools: FakePool, **settings: float) -> None:
        self.store, self.blobs, self.clock = cluster.store, cluster.blobs, cluster.clock
        self.cluster = cluster
        self.metrics = Metrics(CollectorRegistry())
        self.sweeper = Sweeper(
            store=cluster.store,
            blobs=cluster.blobs,
            pools=pools,
            settings=RetentionSettings(**{"session_silence_s": 1e9, **settings}),
            clock=cluster.clock.now,
            metrics=self.metrics,
        )

    async def sweep(self) -> dict[str, int]:
        """One sweep; what went, by kind. Fails when a sweep failed."""
        counts = await self.sweeper.sweep()
        assert self.num_failed() == 0
        return {name: count for name, count in counts.items() if count}

    def num_failed(self) -> int:
        return int(self.metrics.caught_errors.labels("sweep")._value.get())

    def write(self, key: str, *, age_s: float = 0.0) -> BlobKey:
        """A blob that was written that long ago by the cluster's clock."""
        self.blobs.write(key, b"bytes")
        path = self.blobs.path_of(key)
        assert path is not None
        written_at = self.clock.now() - age_s
        os.utime(path, (written_at, written_at))
        return BlobKey(key)


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Store and blobs of a pool that nobody leads."""
    cluster = await Cluster.open(tmp_path)
    yield cluster
    await cluster.close()


async def lead(store: Store) -> LeaseRecord:
    lease = await store.leases.acquire(POOL, "test", ttl_s=1e9)
    assert lease is not None
    return lease


def checkpoint(name: str, key: str, clock: ManualClock, *, ttl_s: float | None = None) -> CheckpointRecord:
    return CheckpointRecord(
        model_id=MODEL,
        tenant_id=TENANT,
        kind=CheckpointKind.TRAINING,
        name=name,
        tinker_path=str(TinkerPath(MODEL, CheckpointKind.TRAINING, name)),
        blob_key=BlobKey(key),
        size_bytes=5,
        seq_id=1,
        created_at=clock.now(),
        base_model=POOL,
        lora=LORA,
        expires_at=None if ttl_s is None else clock.now() + ttl_s,
    )


def load(key: str, *, model_id: str = "session:train:1") -> LoadWeightsOp:
    return LoadWeightsOp(
        ModelId(model_id),
        0,
        path="tinker://anything/weights/a",
        blob_key=BlobKey(key),
        lora=LORA,
        with_optimizer=True,
        creates_model=True,
    )


async def test_blob_without_a_row_goes_after_two_looks_and_never_early(idle: Cluster) -> None:
    swept = Sweeping(idle)
    swept.write(f"{OWN}/old", age_s=HOUR + 1)
    # A writer that is between its blob and its row.
    swept.write(f"{OWN}/young", age_s=60)
    assert await swept.sweep() == {}, "the listing is not due yet"
    swept.clock.advance(HOUR / 6)
    assert await swept.sweep() == {}
    swept.clock.advance(1)
    assert await swept.sweep() == {}, "the second look comes an interval later"
    swept.clock.advance(HOUR / 6)
    assert await swept.sweep() == {"unnamed_blobs": 1}
    assert list(swept.blobs.iter_keys()) == [f"{OWN}/young"]


async def test_blobs_of_another_database_in_the_same_place_are_left_alone(idle: Cluster) -> None:
    swept = Sweeping(idle)
    foreign = [
        swept.write(key, age_s=9 * HOUR)
        for key in ("states/other_train_0/a", "payloads/other_sample_0/a", "snapshots/other_train_0/a", "payloads/a")
    ]
    swept.write(f"{OWN}/a", age_s=9 * HOUR)
    for _ in range(3):
        swept.clock.advance(HOUR / 6)
        await swept.sweep()
    assert sorted(swept.blobs.iter_keys()) == sorted(foreign)


async def test_row_that_comes_between_the_looks_saves_its_blob(idle: Cluster) -> None:
    swept = Sweeping(idle)
    key = swept.write(f"{OWN}/late", age_s=2 * HOUR)
    await idle.create(MODEL)
    swept.clock.advance(HOUR / 6)
    await swept.sweep()
    await idle.store.cycles.finish(
        await lead(idle.store), FinishedCycle(checkpoints=(checkpoint("a", key, idle.clock),))
    )
    for _ in range(3):
        swept.clock.advance(HOUR / 6)
        assert "unnamed_blobs" not in await swept.sweep()
    assert swept.blobs.exists(key)


async def test_what_a_dead_writer_left_half_way_goes(idle: Cluster, tmp_path: Path) -> None:
    swept = Sweeping(idle, unnamed_blobs_s=10)
    unfinished = tmp_path / "blobs" / ".incoming" / "left"
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (0, 0))
    swept.clock.advance(10)
    await swept.sweep()
    assert not unfinished.exists()


async def test_checkpoint_goes_with_its_blob_after_its_time(idle: Cluster) -> None:
    swept = Sweeping(idle)
    key = swept.write("states/a")
    await idle.create(MODEL)
    await idle.store.cycles.finish(
        await lead(idle.store), FinishedCycle(checkpoints=(checkpoint("a", key, idle.clock, ttl_s=HOUR),))
    )
    swept.clock.advance(HOUR + CHECKPOINT_GRACE_S - 1)
    assert "checkpoints" not in await swept.sweep()
    assert await idle.store.checkpoints.of_model(MODEL) == [], "a client cannot see it any more"
    assert swept.blobs.exists(key), "but a load that saw it in the last moment can"
    swept.clock.advance(2)
    assert (await swept.sweep())["checkpoints"] == 1
    assert not swept.blobs.exists(key)


async def test_checkpoint_whose_time_ends_while_a_load_waits_is_still_loaded(idle: Cluster) -> None:
    swept = Sweeping(idle, unnamed_blobs_s=60)
    idle.start()
    await idle.result(await idle.create(MODEL))
    await idle.run(SaveWeightsOp(MODEL, 1, name="a", ttl_s=HOUR))
    (saved,) = await idle.store.checkpoints.of_model(MODEL)
    # Nothing else names the blob: its run is over, and so are its snapshots.
    await idle.run(UnloadModelOp(MODEL, 2))
    await idle.drain()
    request_id = await idle.load(load(saved.blob_key))
    # Its pool is away for long: the checkpoint's row goes, and many sweeps pass over the blob without a name.
    for _ in range(5):
        swept.clock.advance(2 * HOUR)
        await swept.sweep()
        swept.clock.advance(60)
        await swept.sweep()
    assert await idle.store.checkpoints.find(saved.tinker_path) is None
    assert await idle.store.retention.unnamed([saved.blob_key]) == (saved.blob_key,)
    idle.start()
    await idle.result(request_id)
    # Now the run that was made from it names it, for as long as it may be restored from there.
    swept.clock.advance(2 * HOUR)
    for _ in range(3):
        swept.clock.advance(60)
        await swept.sweep()
    assert swept.blobs.exists(saved.blob_key)


@pytest.mark.parametrize("seq_id", [0, 1, 6])
async def test_request_that_comes_again_after_its_row_was_swept_harms_nobody(idle: Cluster, seq_id: int) -> None:
    swept = Sweeping(idle)
    idle.start()
    created = await idle.create(MODEL)
    await idle.result(created)
    request_ids = [created]
    for n in (1, 3, 5):
        request_ids += await idle.submit(pass_op(n, model_id=MODEL), step_op(n + 1, model_id=MODEL))
    for request_id in request_ids:
        await idle.result(request_id)
    # Two snapshots behind the log, and a step, so that nothing in front is needed.
    await idle.run(
        *(SaveWeightsOp(MODEL, n, name=f"at-{n}") for n in (7, 8)),
        pass_op(9, model_id=MODEL),
        step_op(10, model_id=MODEL),
    )
    await idle.store.requests.acknowledge(request_ids)
    swept.clock.advance(48 * HOUR)
    assert (await swept.sweep())["requests"] >= 7
    assert not await idle.store.requests.known_seq_ids(MODEL, 0, 6)

    (again,) = await idle.submit(pass_op(seq_id, model_id=MODEL))
    assert "over long ago" in (await idle.failure(again)).message
    after = await idle.run(pass_op(11, model_id=MODEL), step_op(12, model_id=MODEL))
    assert b'"skipped_passes":0.0' in after[1]
    assert (await idle.model(MODEL)).state is ModelState.READY


async def test_old_versions_go_with_their_blobs(idle: Cluster) -> None:
    swept = Sweeping(idle)
    await idle.create(MODEL)
    for n in range(1, 7):
        swept.clock.advance(1)
        await idle.store.sampling.create(
            SamplingSessionRecord(
                SamplingSessionId(f"{SESSION}:sample:{n}"),
                SESSION,
                TENANT,
                POOL,
                POOL,
                swept.clock.now(),
                blob_key=swept.write(f"states/{n}"),
                model_id=MODEL,
                seq_id=n,
            )
        )
    await idle.store.sessions.touch([SESSION])
    assert await swept.sweep() == {}
    swept.clock.advance(HOUR)
    await idle.store.sessions.touch([SESSION])
    assert await swept.sweep() == {"sampler_versions": 2}
    assert list(swept.blobs.iter_keys()) == [f"states/{n}" for n in range(3, 7)]


async def test_runs_without_a_client_are_put_away_once_their_line_is_empty(idle: Cluster) -> None:
    pool = FakePool(MODEL, ModelId("unknown"))
    swept = Sweeping(idle, pool, FakePool(), session_silence_s=600)
    request_id = await idle.create(MODEL)
    await idle.store.sessions.touch([SESSION])
    assert await swept.sweep() == {}
    swept.clock.advance(601)
    assert await swept.sweep() == {"expired_sessions": 1}
    assert pool.parked == [], "its creation is queued"
    idle.start()
    await idle.result(request_id)
    assert await swept.sweep() == {"cold_runs": 1}
    assert pool.parked == [MODEL]
    await idle.store.sessions.touch([SESSION])
    assert await swept.sweep() == {}


class AwayBlobs:
    """Blobs on a medium that is gone."""

    def __init__(self, inner: BlobStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        def away(*_args: object, **_kwargs: object) -> object:
            raise StoreUnavailable("the blob store could not do it")

        return away


async def test_sweep_that_fails_keeps_no_other_from_its_turn(idle: Cluster, tmp_path: Path) -> None:
    swept = Sweeping(idle, unnamed_blobs_s=1)
    swept.sweeper._unnamed._blobs = AwayBlobs(open_blobs(tmp_path / "other"))  # type: ignore[assignment]
    swept.clock.advance(HOUR)
    counts = await swept.sweeper.sweep()
    assert swept.num_failed() == 1
    assert "unnamed_blobs" not in counts
    assert counts["results"] == counts["sampling_sessions"] == 0


async def test_blob_that_cannot_be_deleted_now_is_deleted_later(idle: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = Sweeping(idle, unnamed_blobs_s=6)
    key = swept.write(f"{OWN}/a", age_s=HOUR)

    def refuse(_key: str) -> None:
        raise StoreUnavailable("the blob store could not delete")

    with monkeypatch.context() as patch:
        patch.setattr(idle.blobs, "delete", refuse)
        for _ in range(3):
            swept.clock.advance(1)
            assert "unnamed_blobs" not in await swept.sweep()
    swept.clock.advance(1)
    assert (await swept.sweep())["unnamed_blobs"] == 1
    assert not swept.blobs.exists(key)
