"""What sweeps may forget, and above all what they may not."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_builders import (
    MODEL,
    SAMPLER,
    SESSION,
    TENANT,
    checkpoint,
    count_queued,
    creation,
    done,
    failed,
    lead,
    model,
    op,
    sample,
    sampling_session,
    session,
    with_run,
)

from treadle.domain.ids import BlobKey, ModelId, RequestId, SamplingSessionId, SessionId, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.records import (
    FinishedCycle,
    LeaseRecord,
    ModelAdvance,
    NewRequest,
    SamplingSessionRecord,
    SnapshotRecord,
)
from treadle.domain.states import ModelState, RequestState, SessionState
from treadle.store import Store, retention
from treadle.testing.clock import ManualClock

HOUR = 3600.0
STEP, PASS, FORWARD = OpKind.OPTIM_STEP, OpKind.FORWARD_BACKWARD, OpKind.FORWARD


async def commit(
    store: Store,
    lease: LeaseRecord,
    rows: Sequence[NewRequest],
    *,
    bad: Sequence[int] = (),
    snapshots: Sequence[int] = (),
    model_id: ModelId = MODEL,
) -> tuple[BlobKey, ...]:
    """Queue these ops and finish them in one cycle, those with seq_ids in `bad` as failed."""
    for row in rows:
        if row.kind is not OpKind.CREATE_MODEL:
            await store.requests.enqueue(row)
    changed = [row.seq_id for row in rows if row.kind in (STEP, PASS, OpKind.CREATE_MODEL) and row.seq_id not in bad]
    return await store.cycles.finish(
        lease,
        FinishedCycle(
            finished=tuple(failed(row) if row.seq_id in bad else done(row) for row in rows),
            advances=(
                ModelAdvance(
                    model_id,
                    next_seq_id=max(row.seq_id for row in rows) + 1,
                    state=ModelState.READY,
                    changed_seq=max(changed, default=None),
                ),
            ),
            snapshots=tuple(
                SnapshotRecord(model_id, seq_id, None if seq_id == 0 else BlobKey(f"snapshots/{model_id}/{seq_id}"))
                for seq_id in snapshots
            ),
        ),
    )


async def acknowledge(store: Store, rows: Sequence[NewRequest]) -> None:
    await store.requests.acknowledge([row.request_id for row in rows])


async def known(store: Store, up_to: int = 1_000) -> set[int]:
    return await store.requests.known_seq_ids(MODEL, 0, up_to)


async def forget_all(store: Store, before: float) -> int:
    count, row = 0, 0
    while True:
        step = await store.retention.forget_requests(finished_before=before, after_row=row)
        count += step.num_forgotten
        if step.next_row is None:
            return count
        row = step.next_row


# Sessions


async def state_of(store: Store, session_id: str = SESSION) -> SessionState:
    record = await store.sessions.get(SessionId(session_id))
    assert record is not None
    return record.state


async def test_silent_session_expires_and_a_heartbeat_wakes_it(store: Store, clock: ManualClock) -> None:
    await store.sessions.create(session(), None)
    await store.sessions.touch([SESSION])
    since = clock.now()
    assert await store.retention.expire_sessions(silent_since=since) == 0
    clock.advance(1)
    assert await store.retention.expire_sessions(silent_since=clock.now()) == 1
    assert await store.retention.expire_sessions(silent_since=clock.now()) == 0
    assert await state_of(store) is SessionState.EXPIRED
    assert await store.retention.revive_sessions(silent_since=clock.now()) == 0

    await store.sessions.touch([SESSION])
    await store.retention.revive_sessions(silent_since=clock.now())
    assert await state_of(store) is SessionState.ACTIVE


async def test_client_that_only_sends_requests_is_alive(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    clock.advance(1)
    since = clock.now()
    assert await store.retention.expire_sessions(silent_since=since) == 1
    lease = await lead(store)
    await commit(store, lease, [creation(), op(1)])
    # A commit of the scheduler's own is no sign of a client.
    clock.advance(10)
    await store.cycles.finish(lease, FinishedCycle(advances=(ModelAdvance(MODEL, 2),)))
    assert await store.retention.revive_sessions(silent_since=clock.now()) == 0
    assert await store.retention.revive_sessions(silent_since=since) == 1
    assert await state_of(store) is SessionState.ACTIVE
    assert await store.retention.expire_sessions(silent_since=since) == 0


async def test_client_that_only_samples_is_alive(store: Store, clock: ManualClock) -> None:
    await store.sessions.create(session(), None)
    await store.sampling.create(sampling_session())
    since = clock.now()
    await store.requests.enqueue(sample(1))
    await store.cycles.finish_samples(await lead(store), [done(sample(1))])
    assert await store.retention.expire_sessions(silent_since=since) == 0
    clock.advance(1)
    assert await store.retention.expire_sessions(silent_since=clock.now()) == 1


async def test_finished_session_neither_expires_nor_wakes(store: Store, clock: ManualClock) -> None:
    await store.sessions.create(session(), None)
    await store.sessions.finish(SESSION, "success")
    assert await store.retention.expire_sessions(silent_since=clock.now()) == 0
    await store.sessions.touch([SESSION])
    assert await store.retention.revive_sessions(silent_since=clock.now()) == 0
    assert await state_of(store) is SessionState.FINISHED


async def test_expired_session_can_still_be_finished(store: Store, clock: ManualClock) -> None:
    await store.sessions.create(session(), None)
    await store.retention.expire_sessions(silent_since=clock.now())
    assert await store.sessions.finish(SESSION, "success")
    assert await state_of(store) is SessionState.FINISHED


async def test_runs_rest_without_a_client_and_without_a_line(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [creation()])
    assert await store.retention.at_rest([MODEL]) == set()
    await store.retention.expire_sessions(silent_since=clock.now() + 1)
    assert await store.retention.at_rest([MODEL, ModelId("other")]) == {MODEL}
    await store.requests.enqueue(op(1))
    assert await store.retention.at_rest([MODEL]) == set()
    await commit(store, lease, [op(1)])
    assert await store.retention.at_rest([MODEL]) == {MODEL}


async def test_runs_of_a_finished_session_end_when_their_line_is_empty(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [creation()], snapshots=[0])
    rows = [op(1), op(2, STEP, num_tokens=0), op(3)]
    await commit(store, lease, rows[:2], snapshots=[2])
    await commit(store, lease, rows[2:])
    await store.requests.enqueue(op(4))
    await store.sessions.finish(SESSION, "success")
    clock.advance(1)
    assert await store.retention.unload_finished(finished_before=clock.now() - 1) == 0
    assert await store.retention.unload_finished(finished_before=clock.now()) == 0
    await commit(store, lease, [op(4)])
    assert await store.retention.unload_finished(finished_before=clock.now()) == 1
    assert await store.retention.unload_finished(finished_before=clock.now()) == 0
    run = await store.models.get(MODEL)
    assert run is not None
    assert run.state is ModelState.UNLOADED

    assert await store.snapshots.retire() == (BlobKey(f"snapshots/{MODEL}/2"),)
    assert await store.snapshots.newest(MODEL) == ()
    assert await store.requests.payload(RequestId(f"{MODEL}:3")) == (b"", None)


# Requests


async def test_log_behind_the_second_newest_snapshot_stays(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    rows = [op(n, STEP if n % 3 == 0 else PASS) for n in range(1, 13)]
    await commit(store, lease, [creation()], snapshots=[0])
    await commit(store, lease, rows, snapshots=[6, 9])
    await acknowledge(store, [creation(), *rows])
    assert await forget_all(store, clock.now()) == 0, "younger than the retention"
    clock.advance(1)
    log = [row.seq_id for row in await store.requests.log(MODEL, after=6, before=100)]
    assert await forget_all(store, clock.now()) == 7
    assert await known(store) == set(range(7, 13))
    assert [row.seq_id for row in await store.requests.log(MODEL, after=6, before=100)] == log
    assert await forget_all(store, clock.now()) == 0


async def test_with_one_snapshot_the_whole_log_stays(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    rows = [op(1), op(2, STEP)]
    await commit(store, lease, [creation()])
    await commit(store, lease, rows, snapshots=[2])
    await acknowledge(store, rows)
    clock.advance(1)
    await forget_all(store, clock.now())
    assert {1, 2} <= await known(store)


async def test_failures_that_the_next_step_reports_stay(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    rows = [op(1), op(2, STEP), op(3), op(4), op(5)]
    await commit(store, lease, [creation()], snapshots=[0])
    # A save holds the open gradient too, so a snapshot may lie behind passes without a step.
    await commit(store, lease, rows, bad=[4], snapshots=[3, 5])
    await acknowledge(store, [creation(), *rows])
    clock.advance(1)
    await forget_all(store, clock.now())
    assert await known(store) == {2, 4, 5}
    assert await store.requests.failed_passes_since_step(MODEL) == {4}


async def test_load_that_ends_the_count_of_failures_stays(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    rows = [op(1), op(2), op(3, OpKind.LOAD_WEIGHTS), op(4), op(5)]
    await commit(store, lease, [creation()], snapshots=[0])
    await commit(store, lease, rows, bad=[2, 4], snapshots=[3, 5])
    await acknowledge(store, [creation(), *rows])
    clock.advance(1)
    assert await store.requests.failed_passes_since_step(MODEL) == {4}
    await forget_all(store, clock.now())
    assert await store.requests.failed_passes_since_step(MODEL) == {4}
    assert await known(store) == {3, 4, 5}


async def test_what_no_replay_reads_goes_by_age(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    rows = [op(1, FORWARD), op(2, OpKind.SAVE_WEIGHTS), op(3, STEP), op(4, OpKind.LOAD_WEIGHTS)]
    await commit(store, lease, [creation()])
    await commit(store, lease, rows, bad=[3])
    await acknowledge(store, [creation(), *rows[:1], *rows[2:]])
    await store.requests.enqueue(op(5, FORWARD))
    clock.advance(1)
    assert await forget_all(store, clock.now()) == 4
    assert await known(store) == {2, 5}, "a result that may be fetched, and what is queued"
    assert (await store.requests.future(RequestId(f"{MODEL}:2"))) is not None


async def test_refused_request_stays_until_it_is_stepped_over(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [creation()])
    await store.requests.enqueue(replace(op(2, FORWARD), failure=failed(op(2)).failure))
    clock.advance(1)
    await forget_all(store, clock.now())
    assert 2 in await known(store)
    await commit(store, lease, [op(1, FORWARD)])
    await store.cycles.finish(lease, FinishedCycle(advances=(ModelAdvance(MODEL, 3),)))
    clock.advance(1)
    await forget_all(store, clock.now())
    assert 2 not in await known(store)


async def test_samples_go_by_age_and_their_session_follows(store: Store, clock: ManualClock) -> None:
    await store.sessions.create(session(), None)
    await store.sampling.create(sampling_session())
    for n in (1, 2):
        await store.requests.enqueue(sample(n))
    await store.cycles.finish_samples(await lead(store), [done(sample(1))])
    await acknowledge(store, [sample(1)])
    clock.advance(HOUR)
    assert await forget_all(store, clock.now()) == 1
    assert await store.requests.get(sample(2).request_id) is not None
    assert await store.retention.forget_sampling_sessions(used_before=clock.now()) == 0, "it has its weights"

    await store.cycles.finish_samples(await lead(store), [failed(sample(2))])
    await store.sessions.finish(SESSION, "success")
    clock.advance(1)
    await store.retention.drop_versions(keep=4, unused_since=0.0, finished_before=clock.now())
    assert await store.retention.forget_sampling_sessions(used_before=clock.now()) == 0, "a row names it"
    assert await forget_all(store, clock.now()) == 1
    assert await store.retention.forget_sampling_sessions(used_before=clock.now()) == 1
    assert await store.sampling.get(SAMPLER) is None


async def test_table_is_walked_in_pages(store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS_PER_SWEEP", 4)
    monkeypatch.setattr(retention, "_FINISHED_PAGE", retention._FINISHED_PAGE.limit(4))
    await store.sessions.create(session(), None)
    await store.sampling.create(sampling_session())
    rows = [sample(n) for n in range(1, 12)]
    for row in rows:
        await store.requests.enqueue(row)
    await store.cycles.finish_samples(await lead(store), [done(row) for row in rows[3:]])
    await acknowledge(store, rows)
    clock.advance(1)
    first = await store.retention.forget_requests(finished_before=clock.now())
    assert first.num_forgotten == 1
    assert first.next_row is not None
    assert await forget_all(store, clock.now()) == 7
    assert await count_queued(store) == (3, 15)


async def test_forgotten_ids_are_told_from_those_that_never_were(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await store.sampling.create(sampling_session())
    await commit(store, await lead(store), [creation(), op(1, FORWARD)])
    ids = {"1": f"{MODEL}:1", "9": f"{MODEL}:9", "sample": f"{SAMPLER}:3"}
    asked = {key: await store.retention.was_forgotten(RequestId(id_), TENANT) for key, id_ in ids.items()}
    assert asked == {"1": True, "9": False, "sample": True}
    for id_ in (f"{MODEL}:x", "nothing", "", f"{MODEL}:{'9' * 30}", "s1:train:9:1"):
        assert not await store.retention.was_forgotten(RequestId(id_), TENANT)
    assert not await store.retention.was_forgotten(RequestId(f"{MODEL}:1"), TenantId("somebody else"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.tuples(st.sampled_from([PASS, PASS, STEP, FORWARD]), st.booleans(), st.booleans()), min_size=1, max_size=20
    )
)
async def test_no_sweep_changes_what_a_restore_reads(
    store: Store, clock: ManualClock, data: list[tuple[OpKind, bool, bool]]
) -> None:
    """Random runs: what leads from either snapshot to the committed state, and what the next step reports, stays."""
    model_id = ModelId(f"s1:train:{int(clock.monotonic())}")
    if clock.monotonic() == 0:
        await store.sessions.create(session(), None)
    await store.models.create(model(model_id), creation(model_id))
    lease = await lead(store)
    await commit(store, lease, [creation(model_id)], snapshots=[0], model_id=model_id)
    await acknowledge(store, [creation(model_id)])
    for seq_id, (kind, is_bad, has_snapshot) in enumerate(data, start=1):
        row = op(seq_id, kind, model_id=model_id)
        bad, snapshots = [seq_id] if is_bad else [], [seq_id] if has_snapshot else []
        await commit(store, lease, [row], bad=bad, snapshots=snapshots, model_id=model_id)
        await acknowledge(store, [row])
    clock.advance(1)
    kept = await store.snapshots.newest(model_id)

    async def needed() -> object:
        logs = [await store.requests.log(model_id, after=snapshot.seq_id, before=100) for snapshot in kept]
        return logs, await store.requests.failed_passes_since_step(model_id)

    before = await needed()
    await forget_all(store, clock.now())
    assert await needed() == before
    # And nothing is kept that neither needs.
    if len(kept) > 1:
        rows = [
            await store.requests.get(RequestId(f"{model_id}:{n}"))
            for n in await store.requests.known_seq_ids(model_id, 0, 100)
        ]
        old = [row for row in rows if row is not None and row.seq_id <= kept[1].seq_id]
        assert sum(row.state is RequestState.DONE for row in old) <= 1, "the newest step, if it lies there"
    clock.advance(1)


# Sampler versions


async def with_versions(
    store: Store, clock: ManualClock, count: int, *, inflight: Collection[int] = ()
) -> list[SamplingSessionRecord]:
    """A run with unnamed versions, a second apart, each with a blob."""
    await with_run(store)
    await store.sessions.touch([SESSION])
    versions = []
    for n in range(1, count + 1):
        clock.advance(1)
        version = replace(
            sampling_session(f"s1:sample:{n}"),
            blob_key=BlobKey(f"states/{n}"),
            model_id=MODEL,
            seq_id=n,
            created_at=clock.now(),
            is_inflight=n in inflight,
        )
        versions.append(await store.sampling.create(version))
    return versions


async def drop_versions(
    store: Store, *, unused_since: float, finished_before: float = 0.0, keep: int = 4
) -> tuple[int, set[str]]:
    count, keys = await store.retention.drop_versions(
        keep=keep, unused_since=unused_since, finished_before=finished_before
    )
    return count, set(keys)


async def dropped(store: Store) -> set[str]:
    records = await store.sampling.of_session(SESSION)
    return {record.sampling_session_id for record in records if record.is_dropped}


async def test_newest_versions_stay_and_so_does_what_was_used(store: Store, clock: ManualClock) -> None:
    versions = await with_versions(store, clock, 7)
    assert await drop_versions(store, unused_since=versions[0].created_at) == (0, set())
    # The second one was sampled a moment ago.
    clock.advance(HOUR)
    used = sample(1, sampler="s1:sample:2")
    await store.requests.enqueue(used)
    await store.cycles.finish_samples(await lead(store), [done(used)])
    assert await drop_versions(store, unused_since=clock.now()) == (2, {"states/1", "states/3"})
    assert await dropped(store) == {"s1:sample:1", "s1:sample:3"}
    ids = [SamplingSessionId(f"s1:sample:{n}") for n in (1, 2, 3, 4, 99)]
    assert await store.retention.dropped_among(ids) == {ids[0], ids[2], ids[4]}
    assert await drop_versions(store, unused_since=clock.now()) == (0, set())
    clock.advance(1)
    assert await drop_versions(store, unused_since=clock.now()) == (1, {"states/2"})


async def test_version_with_a_queued_sample_stays(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 5)
    clock.advance(HOUR)
    await store.requests.enqueue(sample(1, sampler="s1:sample:1"))
    assert await drop_versions(store, unused_since=clock.now()) == (0, set())


async def test_version_that_a_queued_sample_of_another_session_takes_stays(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 7, inflight=range(1, 8))
    clock.advance(HOUR)
    borrowing = replace(sample(1, sampler="s1:sample:1"), weights_id=SamplingSessionId("s1:sample:2"))
    await store.requests.enqueue(borrowing)
    # The session's own weights stay too, and the third ones go.
    assert await drop_versions(store, unused_since=clock.now() + 1) == (1, {"states/3"})
    await store.cycles.finish_samples(await lead(store), [done(borrowing)])
    # It counts as used from the sample's admission on.
    assert await drop_versions(store, unused_since=clock.now()) == (0, set())
    clock.advance(1)
    assert await drop_versions(store, unused_since=clock.now()) == (2, {"states/1", "states/2"})


async def test_snapshots_do_not_push_out_what_inflight_clients_sample(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 7, inflight=[1])
    clock.advance(HOUR)
    assert await drop_versions(store, unused_since=clock.now()) == (2, {"states/2", "states/3"})


async def test_versions_of_a_silent_client_are_not_kept_for_their_use(store: Store, clock: ManualClock) -> None:
    versions = await with_versions(store, clock, 5)
    await store.retention.expire_sessions(silent_since=clock.now() + 1)
    assert await drop_versions(store, unused_since=versions[0].created_at) == (1, {"states/1"})


async def test_versions_of_other_runs_count_for_themselves(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 4)
    other = ModelId("s1:train:1")
    await store.models.create(model(other), creation(other))
    await store.sampling.create(
        replace(sampling_session("s1:sample:9"), blob_key=BlobKey("states/9"), model_id=other, created_at=clock.now())
    )
    clock.advance(HOUR)
    assert await drop_versions(store, unused_since=clock.now()) == (0, set())


async def test_finished_session_keeps_no_version(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 2)
    await store.sampling.create(sampling_session("s1:sample:9"))
    await store.sessions.finish(SESSION, "success")
    assert await drop_versions(store, unused_since=0.0, finished_before=clock.now()) == (0, set())
    clock.advance(1)
    assert await drop_versions(store, unused_since=0.0, finished_before=clock.now()) == (3, {"states/1", "states/2"})


async def test_weights_of_a_checkpoint_that_is_gone_go_when_unused(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    saved = checkpoint("a", blob_key="states/a", expires_at=clock.now() + HOUR)
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(saved,)))
    await store.sampling.create(
        replace(sampling_session(), model_path=saved.tinker_path, blob_key=saved.blob_key, model_id=MODEL)
    )
    clock.advance(2 * HOUR)
    assert await drop_versions(store, unused_since=clock.now(), keep=1) == (0, set())
    # The sampling session still names the blob.
    assert await store.retention.drop_checkpoints(expired_before=clock.now()) == (1, ())
    assert await drop_versions(store, unused_since=1.0, keep=1) == (0, set())
    assert await drop_versions(store, unused_since=clock.now(), keep=1) == (1, {"states/a"})


async def test_weights_of_a_checkpoint_that_was_overwritten_go_when_unused(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    saved = checkpoint("a", blob_key="states/a")
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(saved,)))
    await store.sampling.create(
        replace(sampling_session(), model_path=saved.tinker_path, blob_key=saved.blob_key, model_id=MODEL)
    )
    clock.advance(HOUR)
    assert await drop_versions(store, unused_since=clock.now(), keep=1) == (0, set())
    again = checkpoint("a", blob_key="states/b")
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(again,)))
    assert await drop_versions(store, unused_since=clock.now(), keep=1) == (1, {"states/a"})


async def test_blob_of_a_dropped_version_that_a_snapshot_names_stays(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 2)
    lease = await lead(store)
    await commit(store, lease, [creation()])
    await store.cycles.finish(lease, FinishedCycle(snapshots=(SnapshotRecord(MODEL, 0, BlobKey("states/1")),)))
    clock.advance(HOUR)
    assert await drop_versions(store, unused_since=clock.now(), keep=1) == (1, set())


# Checkpoints and names


async def test_checkpoints_go_when_their_time_is_up(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    now = clock.now()
    kept = checkpoint("kept", blob_key="states/kept")
    short = checkpoint("short", blob_key="states/short", expires_at=now + HOUR)
    shared = checkpoint("shared", blob_key="states/kept", expires_at=now + HOUR)
    loaded = checkpoint("loaded", blob_key="states/loaded", expires_at=now + HOUR)
    await commit(store, lease, [creation()])
    await store.cycles.finish(
        lease,
        FinishedCycle(
            checkpoints=(kept, short, shared, loaded),
            snapshots=(SnapshotRecord(MODEL, 0, BlobKey("states/loaded")),),
        ),
    )
    assert await store.retention.drop_checkpoints(expired_before=now + HOUR) == (0, ())
    clock.advance(HOUR + 1)
    assert await store.retention.drop_checkpoints(expired_before=clock.now()) == (3, (BlobKey("states/short"),))
    assert [record.name for record in await store.checkpoints.of_model(MODEL)] == ["kept"]


async def test_every_kind_of_name_counts(store: Store, clock: ManualClock) -> None:
    await with_versions(store, clock, 1)
    lease = await lead(store)
    await commit(store, lease, [creation()], snapshots=[0])
    await commit(store, lease, [op(1)], snapshots=[1])
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(checkpoint(blob_key="states/c"),)))
    await store.requests.enqueue(op(2, payload=b"", payload_key="payloads/p"))
    named = ["states/c", "states/1", f"snapshots/{MODEL}/1", "payloads/p"]
    keys = [BlobKey(key) for key in (*named, "states/x", "payloads/y")]
    assert await store.retention.unnamed(keys) == ("states/x", "payloads/y")
    assert await store.retention.unnamed([]) == ()


async def test_queued_loads_are_found_and_finished_ones_not(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [creation()])
    await store.requests.enqueue(op(1, OpKind.LOAD_WEIGHTS, payload=b"first"))
    await store.requests.enqueue(op(2, OpKind.LOAD_WEIGHTS, payload=b"second"))
    await store.requests.enqueue(op(3, payload=b"pass"))
    assert await store.retention.queued_loads() == [b"first", b"second"]
    await commit(store, lease, [op(1, OpKind.LOAD_WEIGHTS)])
    assert await store.retention.queued_loads() == [b"second"]


async def test_two_servers_sweep_the_same_rows(store: Store, database_url: str, clock: ManualClock) -> None:
    await with_versions(store, clock, 8)
    lease = await lead(store)
    rows = [op(n, FORWARD) for n in range(1, 30)]
    await commit(store, lease, [creation()])
    await commit(store, lease, rows)
    await acknowledge(store, [creation(), *rows])
    saved = checkpoint("a", blob_key="states/a", expires_at=clock.now())
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(saved,)))
    clock.advance(HOUR)
    other = await Store.open(database_url, clock=clock.now)
    try:
        now = clock.now()
        both = (store.retention, other.retention)
        forgotten = await asyncio.gather(*(one.forget_requests(finished_before=now) for one in both))
        versions = await asyncio.gather(
            *(one.drop_versions(keep=4, unused_since=now, finished_before=0.0) for one in both)
        )
        gone = await asyncio.gather(*(one.drop_checkpoints(expired_before=now) for one in both))
    finally:
        await other.close()
    assert sum(step.num_forgotten for step in forgotten) == 30
    assert sum(count for count, _ in versions) == 4
    assert sorted(key for _, keys in versions for key in keys) == [f"states/{n}" for n in range(1, 5)]
    assert sorted(key for _, keys in gone for key in keys) == ["states/a"]
    assert await dropped(store) == {SamplingSessionId(f"s1:sample:{n}") for n in range(1, 5)}
