"""What a run's state is restored from, and how long the log behind it is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builders import (
    MODEL,
    checkpoint,
    creation,
    done,
    enqueue_all,
    failed,
    lead,
    model,
    op,
    sample,
    sampling_session,
    session,
    snapshot,
    with_run,
)

from treadle.domain.ids import BlobKey, ModelId
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle, LeaseRecord, ModelAdvance, NewRequest, SnapshotRecord
from treadle.domain.states import ModelState
from treadle.store import Store
from treadle.store.blob_names import named_among
from treadle.testing.clock import ManualClock

PASS, STEP, LOAD = OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP, OpKind.LOAD_WEIGHTS


async def commit(
    store: Store, lease: LeaseRecord, requests: Sequence[NewRequest] = (), *snapshots: SnapshotRecord
) -> set[str]:
    """Enqueue and finish these requests, all of one run, and register the snapshots; the keys to delete."""
    await enqueue_all(store, requests)
    next_seq_ids = {request.model_id: request.seq_id + 1 for request in requests if request.model_id is not None}
    cycle = FinishedCycle(
        finished=tuple(done(request) for request in requests),
        advances=tuple(ModelAdvance(model_id, seq_id) for model_id, seq_id in next_seq_ids.items()),
        snapshots=snapshots,
    )
    return set(await store.cycles.finish(lease, cycle))


async def newest_seq_ids(store: Store, model_id: str = MODEL) -> list[int]:
    return [record.seq_id for record in await store.snapshots.newest(ModelId(model_id))]


async def kept_payloads(store: Store, model_id: str, stop: int) -> set[int]:
    """Which ops of a run still have a payload, or name the blob that holds it."""
    payloads = await store.requests.payloads([op(n, model_id=model_id).request_id for n in range(stop)])
    return {int(request_id.rpartition(":")[2]) for request_id, found in payloads.items() if found != (b"", None)}


async def test_two_newest_snapshots_are_kept_with_the_log_behind_the_older(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    assert await store.snapshots.newest(MODEL) == ()
    seed = snapshot(0, blob_key=None)
    assert await commit(store, lease, [creation()], seed) == set()
    born_at = clock.now()
    clock.advance(1.0)
    large = op(3, payload=b"", payload_key="payloads/3")
    first = snapshot(2, with_optimizer=False)
    assert await commit(store, lease, [op(1), op(2, STEP), large, op(4, STEP)], first) == set()
    assert await store.snapshots.newest(MODEL) == (
        replace(first, created_at=clock.now()),
        replace(seed, created_at=born_at),
    )
    assert await kept_payloads(store, MODEL, 9) == {1, 2, 3, 4}

    assert await commit(store, lease, [op(5), op(6, STEP)], snapshot(4)) == set()
    assert await newest_seq_ids(store) == [4, 2]
    assert await kept_payloads(store, MODEL, 9) == {3, 4, 5, 6}

    # The large payload and the retired file are the caller's to delete.
    assert await commit(store, lease, [], snapshot(6)) == {"payloads/3", first.blob_key}
    assert await newest_seq_ids(store) == [6, 4]
    assert await kept_payloads(store, MODEL, 9) == {5, 6}


async def test_payload_stays_only_with_what_a_replay_does_again(store: Store) -> None:
    await with_run(store)
    await store.sampling.create(sampling_session())
    lease = await lead(store)
    kinds = [PASS, STEP, OpKind.FORWARD, OpKind.SAVE_WEIGHTS, OpKind.SAVE_FOR_SAMPLER, PASS, STEP]
    inline = [op(n, kind) for n, kind in enumerate(kinds, start=1)]
    large = [
        op(n, kind, payload=b"", payload_key=f"payloads/{n}") for n, kind in enumerate(kinds, start=len(kinds) + 1)
    ]
    await enqueue_all(store, [*inline, *large, sample(1)])
    # The last pass and the last step of either half fail.
    ends = [[*(done(r) for r in half[:5]), *(failed(r) for r in half[5:])] for half in (inline, large)]
    keys = await store.cycles.finish(lease, FinishedCycle(finished=(*ends[0], *ends[1])))
    assert await kept_payloads(store, MODEL, 20) == {0, 1, 2, 8, 9}
    assert set(keys) == {f"payloads/{n}" for n in range(10, 15)}
    assert await store.cycles.finish_samples(lease, [done(sample(1))]) == ()
    assert await store.requests.payload(sample(1).request_id) == (b"", None)


async def test_large_prompt_is_handed_out_for_deletion(store: Store) -> None:
    await store.sessions.create(session(), None)
    await store.sampling.create(sampling_session())
    request = replace(sample(1), payload=b"", payload_key=BlobKey("payloads/x"))
    await store.requests.enqueue(request)
    assert await store.cycles.finish_samples(await lead(store), [done(request)]) == ("payloads/x",)
    # A final row is left alone, so its key is handed out once.
    assert await store.cycles.finish_samples(await lead(store), [done(request)]) == ()


async def test_late_arrival_gives_its_large_payload_back(store: Store) -> None:
    await with_run(store)
    late = op(1, payload=b"", payload_key="payloads/late")
    await store.requests.enqueue(late)
    given_up = op(1, payload=b"", failure=failed(late).failure)
    keys = await store.cycles.finish(
        await lead(store), FinishedCycle(never_received=(given_up,), advances=(ModelAdvance(MODEL, 2),))
    )
    assert keys == ("payloads/late",)


async def test_runs_are_retired_apart(store: Store) -> None:
    other = "s1:train:1"
    await with_run(store, MODEL, other)
    lease = await lead(store)
    for seq_id in (1, 2, 3):
        requests = [op(seq_id, STEP), op(seq_id, STEP, model_id=other)]
        keys = await commit(store, lease, requests, *(snapshot(seq_id, model_id=id_) for id_ in (MODEL, other)))
    assert keys == {f"snapshots/{id_}/1" for id_ in (MODEL, other)}
    assert await newest_seq_ids(store) == await newest_seq_ids(store, other) == [3, 2]
    assert await kept_payloads(store, MODEL, 9) == {0, 3}
    assert await kept_payloads(store, other, 9) == {0, 3}


async def test_snapshot_of_what_is_not_committed_is_a_bug(store: Store) -> None:
    """R3: a restore from it would apply its last ops twice."""
    await with_run(store)
    await store.requests.enqueue(op(1))
    with pytest.raises(AssertionError, match="not committed"):
        await store.cycles.finish(
            await lead(store), FinishedCycle(advances=(ModelAdvance(MODEL, 1),), snapshots=(snapshot(1),))
        )
    assert await store.snapshots.newest(MODEL) == ()
    with pytest.raises(AssertionError, match="not committed"):
        await store.cycles.finish(await lead(store), FinishedCycle(snapshots=(snapshot(0, model_id="nobody"),)))


async def test_snapshot_that_comes_late_is_put_in_its_place(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [op(n, STEP) for n in range(1, 6)], snapshot(1), snapshot(5))
    # Between the two: the fall-back becomes newer.
    assert await commit(store, lease, [], snapshot(3)) == {"snapshots/s1:train:0/1"}
    assert await newest_seq_ids(store) == [5, 3]
    assert await kept_payloads(store, MODEL, 9) == {0, 4, 5}
    # Behind both: nothing needs it.
    assert await commit(store, lease, [], snapshot(2)) == {"snapshots/s1:train:0/2"}
    assert await newest_seq_ids(store) == [5, 3]


async def test_nothing_in_front_of_a_load_serves_any_more(store: Store) -> None:
    """A load is not in the log: from an older snapshot, what follows would be done to the weights it replaced."""
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [creation(), op(1), op(2, STEP)], snapshot(0, blob_key=None), snapshot(2))
    loaded = snapshot(4, blob_key="states/other/1", with_optimizer=False)
    assert await commit(store, lease, [op(3), op(4, LOAD), op(5, STEP)], loaded) == {"snapshots/s1:train:0/2"}
    assert await newest_seq_ids(store) == [4]
    assert await kept_payloads(store, MODEL, 9) == {5}
    # One that was taken before the load and written behind it.
    assert await commit(store, lease, [], snapshot(3)) == {"snapshots/s1:train:0/3"}
    assert await newest_seq_ids(store) == [4]
    # Not even when the load's own blob has turned out unreadable.
    await store.snapshots.drop(lease, MODEL, 4)
    assert await commit(store, lease, [], snapshot(3)) == {"snapshots/s1:train:0/3"}
    assert await newest_seq_ids(store) == []
    # The log behind the load stays for one that may still come.
    assert await kept_payloads(store, MODEL, 9) == {5}
    await commit(store, lease, [], snapshot(5))
    assert await newest_seq_ids(store) == [5]


async def test_load_that_is_not_registered_leaves_nothing_to_restore(store: Store) -> None:
    """Better lost than on other weights than the client was told of."""
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [creation(), op(1)], snapshot(0, blob_key=None))
    await commit(store, lease, [op(2, LOAD), op(3, STEP)])
    assert await newest_seq_ids(store) == []


async def test_unreadable_snapshot_is_forgotten_and_the_one_before_serves(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [op(n, STEP) for n in (1, 2, 3)], snapshot(1), snapshot(2))
    for _ in range(2):
        await store.snapshots.drop(lease, MODEL, 2)
        assert await newest_seq_ids(store) == [1]
    # All that leads from it to the committed state is there.
    log = await store.requests.log(MODEL, after=1, before=4)
    assert {record.seq_id for record in log} == {2, 3} <= await kept_payloads(store, MODEL, 9)
    await store.snapshots.drop(lease, MODEL, 1)
    assert await newest_seq_ids(store) == []


async def test_snapshot_of_the_same_op_replaces_the_first(store: Store) -> None:
    """The answer to the first may have been lost, and its file with it: the leader knows the second."""
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [op(1, STEP)], snapshot(1, blob_key="snapshots/a"))
    assert await commit(store, lease, [], snapshot(1, blob_key="snapshots/b")) == {"snapshots/a"}
    assert [record.blob_key for record in await store.snapshots.newest(MODEL)] == ["snapshots/b"]
    assert await commit(store, lease, [], snapshot(1, blob_key="snapshots/b")) == set()


async def test_blob_of_a_checkpoint_is_never_handed_out(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    saved = checkpoint(blob_key="states/1")
    await enqueue_all(store, [op(n, STEP) for n in range(1, 5)])
    await store.cycles.finish(
        lease,
        FinishedCycle(
            finished=tuple(done(op(n, STEP)) for n in range(1, 5)),
            advances=(ModelAdvance(MODEL, 5),),
            checkpoints=(saved,),
            snapshots=(snapshot(1, blob_key="states/1"),),
        ),
    )
    # Deleting the checkpoint leaves the snapshot ...
    assert await store.checkpoints.delete(saved.tinker_path)
    assert [record.blob_key for record in await store.snapshots.newest(MODEL)] == ["states/1"]
    assert await named(store, "states/1") == {"states/1"}
    # ... and a retired snapshot leaves a checkpoint's file, which has a life of its own.
    assert await commit(store, lease, [], snapshot(2), snapshot(3)) == set()
    assert await newest_seq_ids(store) == [3, 2]
    assert await named(store, "states/1") == set()


async def test_blob_that_another_row_names_is_not_handed_out(store: Store) -> None:
    other = "s1:train:1"
    await with_run(store, MODEL, other)
    lease = await lead(store)
    shared = "snapshots/shared"
    await commit(store, lease, [creation(other)], snapshot(0, model_id=other, blob_key=shared))
    await commit(store, lease, [op(n, STEP) for n in (1, 2, 3)], snapshot(1, blob_key=shared))
    assert await commit(store, lease, [], snapshot(2), snapshot(3)) == set()
    assert [record.blob_key for record in await store.snapshots.newest(ModelId(other))] == [shared]


async def test_every_row_that_names_a_blob_counts(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    await enqueue_all(store, [op(1), op(2, payload=b"", payload_key="payloads/2")])
    cycle = FinishedCycle(
        finished=(done(op(1)),),
        advances=(ModelAdvance(MODEL, 2),),
        checkpoints=(checkpoint(blob_key="states/1"),),
        sampling_sessions=(replace(sampling_session(), blob_key=BlobKey("states/2")),),
        snapshots=(snapshot(1),),
    )
    await store.cycles.finish(lease, cycle)
    all_named = {"payloads/2", "states/1", "states/2", "snapshots/s1:train:0/1"}
    assert await named(store, *all_named, "states/3") == all_named


@pytest.mark.parametrize("state", [ModelState.UNLOADED, ModelState.FAILED])
async def test_run_that_is_over_keeps_nothing(store: Store, state: ModelState) -> None:
    await with_run(store)
    lease = await lead(store)
    large = op(2, STEP, payload=b"", payload_key="payloads/2")
    await commit(store, lease, [op(1), large, op(3)], snapshot(0, blob_key=None), snapshot(2))
    unload = op(4, OpKind.UNLOAD_MODEL)
    await store.requests.enqueue(unload)
    advance = ModelAdvance(MODEL, 5, state=state)
    cycle = FinishedCycle(finished=(done(unload),), advances=(advance,))
    assert set(await store.cycles.finish(lease, cycle)) == {"payloads/2", "snapshots/s1:train:0/2"}
    assert await newest_seq_ids(store) == []
    assert await kept_payloads(store, MODEL, 9) == {0}
    # What was on its way meanwhile is not needed either.
    late = (snapshot(3), snapshot(4, blob_key="states/4"))
    assert await commit(store, lease, [], *late) == {"snapshots/s1:train:0/3"}
    assert await newest_seq_ids(store) == []


async def test_lost_run_keeps_what_it_has(store: Store) -> None:
    """Somebody may find a way to read it after all."""
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [op(1), op(2, STEP)], snapshot(1))
    await store.cycles.finish(lease, FinishedCycle(advances=(ModelAdvance(MODEL, 3, state=ModelState.LOST),)))
    assert await newest_seq_ids(store) == [1]
    assert await kept_payloads(store, MODEL, 9) == {0, 2}


async def test_debt_tells_what_is_kept(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    empty = await store.snapshots.debt(MODEL)
    assert (empty.snapshots, empty.num_payloads, empty.payload_bytes) == ((), 0, 0)
    large = replace(op(4, payload=b"", payload_key="payloads/4"), payload_bytes=10**6)
    await commit(store, lease, [op(n, payload=b"12345") for n in (1, 2, 3)], snapshot(1), snapshot(2))
    await commit(store, lease, [large, op(5, OpKind.FORWARD)])
    await store.requests.enqueue(op(6))
    debt = await store.snapshots.debt(MODEL)
    assert debt.snapshots == tuple(replace(snapshot(n), created_at=clock.now()) for n in (2, 1))
    assert (debt.num_payloads, debt.payload_bytes) == (3, 10**6 + 10)


async def test_long_log_is_retired_in_steps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours without a snapshot, dropping all of it at once would hold up everybody's admissions."""
    monkeypatch.setattr("treadle.store.snapshots.MAX_RETIRED_ROWS", 2)
    await with_run(store, MODEL, "s1:train:1")
    lease = await lead(store)
    large = op(5, payload=b"", payload_key="payloads/5")
    await commit(store, lease, [*(op(n) for n in range(1, 5)), large, op(6)], snapshot(6))
    assert await kept_payloads(store, MODEL, 9) == {0, 3, 4, 5, 6}
    # Nobody reads what is left over, and the next commit or the sweep goes on with it.
    assert await newest_seq_ids(store) == [6]
    await commit(store, lease, [], snapshot(6))
    assert await kept_payloads(store, MODEL, 9) == {0, 5, 6}
    await commit(store, lease, [*(op(n) for n in range(7, 11))], snapshot(10), snapshot(9))
    assert await kept_payloads(store, MODEL, 11) == {0, 7, 8, 9, 10}
    assert await store.snapshots.retire() == ()
    assert await kept_payloads(store, MODEL, 11) == {0, 10}


async def test_sweep_of_another_server_works_beside_the_leader(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treadle.store.snapshots.MAX_RETIRED_ROWS", 1)
    await with_run(store)
    lease = await lead(store)
    other = await Store.open(database_url)
    deleted: list[str] = []
    is_over = asyncio.Event()

    async def sweep() -> None:
        while not is_over.is_set():
            deleted.extend(await other.snapshots.retire())

    sweeping = asyncio.create_task(sweep())
    for seq_id in range(1, 31, 3):
        large = op(seq_id + 1, payload=b"", payload_key=f"payloads/{seq_id + 1}")
        deleted += await commit(store, lease, [op(seq_id), large, op(seq_id + 2, STEP)], snapshot(seq_id + 2))
    is_over.set()
    await sweeping
    deleted += await store.snapshots.retire()
    await other.close()
    # Each blob was handed out once, by whoever retired it.
    payload_keys = [f"payloads/{seq_id}" for seq_id in range(2, 27, 3)]
    snapshot_keys = [f"snapshots/{MODEL}/{seq_id}" for seq_id in range(3, 25, 3)]
    assert sorted(deleted) == sorted(payload_keys + snapshot_keys)
    assert await newest_seq_ids(store) == [30, 27]
    assert await kept_payloads(store, MODEL, 40) == {0, 28, 29, 30}


async def test_sweep_retires_runs_that_were_ended_outside_a_cycle(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    await commit(store, lease, [op(1), op(2, STEP)], snapshot(1), snapshot(2))
    assert await store.snapshots.retire() == ()
    end = "UPDATE models SET state = 'unloaded'"
    await store._writer.run(lambda conn: conn.exec_driver_sql(end).rowcount)
    assert set(await store.snapshots.retire()) == {f"snapshots/{MODEL}/1", f"snapshots/{MODEL}/2"}
    assert await newest_seq_ids(store) == []
    assert await kept_payloads(store, MODEL, 9) == {0}
    assert await store.snapshots.retire() == ()


@dataclass
class Oracle:
    """One run as the store should see it, by the rules and not by their implementation."""

    model_id: ModelId
    rows: dict[int, tuple[OpKind, bool]] = field(default_factory=dict)
    payload_keys: dict[int, str] = field(default_factory=dict)
    snapshot_keys: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)

    def log_behind(self, seq_id: int) -> set[int]:
        """What must be done again from a snapshot of this op."""
        kinds = (PASS, STEP)
        return {n for n, (kind, is_done) in self.rows.items() if n > seq_id and is_done and kind in kinds}

    @property
    def newest_load(self) -> int:
        return max(n for n, (kind, is_done) in self.rows.items() if is_done and kind in (LOAD, OpKind.CREATE_MODEL))


EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([PASS, PASS, STEP, STEP, OpKind.FORWARD, LOAD]),
            st.booleans(),
            st.sampled_from([True, True, True, False]),
        ),
        # How many ops ago the snapshot was taken that lands now.
        st.tuples(st.just("snapshot"), st.sampled_from([0, 0, 0, 1, 3, 9])),
        st.tuples(st.just("drop"), st.integers(0, 1)),
    ),
    max_size=14,
)


async def play(store: Store, lease: LeaseRecord, model_id: ModelId, events: Sequence[tuple[object, ...]]) -> None:
    """Do these things to a new run, and check after each that what is kept is what a restore needs."""
    oracle = Oracle(model_id, rows={0: (OpKind.CREATE_MODEL, True)})
    await store.models.create(model(model_id), creation(model_id))
    oracle.deleted |= await commit(store, lease, [creation(model_id)], snapshot(0, model_id=model_id, blob_key=None))
    for event in events:
        match event:
            case (OpKind() as kind, bool(is_large), bool(is_done)):
                await play_op(store, lease, oracle, kind, is_large=is_large, is_done=is_done)
            case ("snapshot", int(age)):
                seq_id = max(0, len(oracle.rows) - 1 - age)
                key = f"snapshots/{model_id}/{len(oracle.snapshot_keys)}"
                oracle.snapshot_keys.add(key)
                before = [
                    record.blob_key for record in await store.snapshots.newest(model_id) if record.seq_id < seq_id
                ]
                landed = snapshot(seq_id, model_id=model_id, blob_key=key)
                oracle.deleted |= await commit(store, lease, [], landed)
                if age == 0:
                    now = [record.blob_key for record in await store.snapshots.newest(model_id)]
                    assert now == [key, *before][:2], "the newest, and the one before to fall back on"
            case ("drop", int(place)):
                unreadable = (await store.snapshots.newest(model_id))[place : place + 1]
                for record in unreadable:
                    await store.snapshots.drop(lease, model_id, record.seq_id)
                    if record.blob_key is not None:
                        oracle.unreadable.add(record.blob_key)
        await check(store, oracle)


async def play_op(
    store: Store, lease: LeaseRecord, oracle: Oracle, kind: OpKind, *, is_large: bool, is_done: bool
) -> None:
    seq_id = len(oracle.rows)
    key = f"payloads/{oracle.model_id}/{seq_id}" if is_large else None
    request = op(seq_id, kind, model_id=oracle.model_id, payload=b"" if is_large else b"x", payload_key=key)
    await store.requests.enqueue(request)
    cycle = FinishedCycle(
        finished=(done(request) if is_done else failed(request),),
        advances=(ModelAdvance(oracle.model_id, seq_id + 1),),
        snapshots=(snapshot(seq_id, model_id=oracle.model_id, blob_key="states/x"),)
        if kind is LOAD and is_done
        else (),
    )
    oracle.rows[seq_id] = (kind, is_done)
    if key is not None:
        oracle.payload_keys[seq_id] = key
    oracle.deleted |= set(await store.cycles.finish(lease, cycle))


async def check(store: Store, oracle: Oracle) -> None:
    num_rows = len(oracle.rows)
    # A commit retires a few at once; the sweep goes on.
    oracle.deleted |= set(await store.snapshots.retire())
    kept = await store.snapshots.newest(oracle.model_id)
    payloads = await kept_payloads(store, oracle.model_id, num_rows)
    for record in kept:
        assert oracle.log_behind(record.seq_id) <= payloads, "the log leads from each snapshot to the committed state"
        assert record.seq_id >= oracle.newest_load, "no load is missing from that log"
        log = await store.requests.log(oracle.model_id, after=record.seq_id, before=num_rows)
        assert {row.seq_id for row in log} == oracle.log_behind(record.seq_id)
    if kept:
        assert payloads <= oracle.log_behind(kept[-1].seq_id), "nothing older is kept"
    # A file is in use, or handed out for deletion, and never both; but a damaged one is left to a sweep.
    in_use = {record.blob_key for record in kept} | {oracle.payload_keys.get(n) for n in payloads}
    assert not in_use & oracle.deleted
    made = oracle.snapshot_keys | set(oracle.payload_keys.values())
    assert made - in_use - oracle.unreadable <= oracle.deleted <= made
    assert await named(store, *made) == in_use & made


@pytest.mark.parametrize("max_retired_rows", [1, 1_000])
def test_what_is_kept_is_what_a_restore_needs(
    database_url: str, max_retired_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treadle.store.snapshots.MAX_RETIRED_ROWS", max_retired_rows)
    numbers = count()
    with asyncio.Runner() as runner:
        store = runner.run(open_store(database_url))
        lease = runner.run(lead(store))
        runner.run(store.sessions.create(session(), None))

        @settings(max_examples=30, deadline=None)
        @given(EVENTS)
        def play_all(events: list[tuple[object, ...]]) -> None:
            runner.run(play(store, lease, ModelId(f"s1:train:{next(numbers)}"), events))

        try:
            play_all()
        finally:
            runner.run(store.close())


async def open_store(url: str) -> Store:
    return await Store.open(url, clock=ManualClock().now)


async def named(store: Store, *keys: str) -> set[str]:
    return set(await store._database.read(lambda conn: named_among(conn, [BlobKey(key) for key in keys])))
