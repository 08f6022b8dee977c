"""Leases, fencing, and what one commit of the scheduler makes public."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from store_builders import (
    MODEL,
    POOL,
    TENANT,
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
    snapshot,
    with_run,
    with_sampler,
)

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.outcome import Failure
from treadle.domain.records import FinishedCycle, ModelAdvance, RunLogEntry
from treadle.domain.states import Category, ModelState, RequestState
from treadle.errors import Fenced, ServerError
from treadle.store import Store
from treadle.testing.clock import ManualClock

NEVER_RECEIVED = Failure("never received", Category.USER)


async def test_lease_has_one_holder_and_growing_tokens(store: Store, clock: ManualClock) -> None:
    assert await store.leases.current(POOL) is None
    first = await store.leases.acquire(POOL, "a", ttl_s=10.0)
    assert first is not None
    assert await store.leases.current(POOL) == first
    assert await store.leases.acquire(POOL, "b", ttl_s=10.0) is None
    assert await store.leases.acquire(PoolName("other"), "b", ttl_s=10.0) is not None

    # The same holder, started again, fences its former self.
    again = await store.leases.acquire(POOL, "a", ttl_s=10.0)
    assert again is not None
    assert again.token == first.token + 1

    clock.advance(9.0)
    assert await store.leases.acquire(POOL, "b", ttl_s=10.0) is None
    clock.advance(1.0)
    assert await store.leases.current(POOL) is None
    taken = await store.leases.acquire(POOL, "b", ttl_s=10.0)
    assert taken is not None
    assert taken.token == again.token + 1


async def test_released_lease_is_free_at_once(store: Store) -> None:
    first = await lead(store, "a")
    await store.leases.release(first)
    assert await store.leases.current(POOL) is None
    second = await lead(store, "b")
    assert second.token == first.token + 1
    # A late release of the old lease does not free the new one.
    await store.leases.release(first)
    assert await store.leases.current(POOL) == second


async def test_next_leader_sees_what_was_in_flight(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    assert await store.leases.in_flight(POOL) == ()
    lease = await lead(store, "a")
    await store.cycles.begin(lease, 7, [op(1).request_id])
    taken = await lead(store, "a")
    assert taken.cycle == 7
    assert await store.leases.in_flight(POOL) == (op(1).request_id,)
    await store.cycles.finish(taken, FinishedCycle(finished=(done(op(1)),)))
    assert await store.leases.in_flight(POOL) == ()


async def test_samples_do_not_end_the_cycle_in_flight(store: Store) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    lease = await lead(store)
    await store.cycles.begin(lease, 1, [RequestId("x")])
    await store.cycles.finish_samples(lease, [done(sample(1))])
    assert await store.leases.in_flight(POOL) == (RequestId("x"),)


async def test_fenced_leader_writes_nothing(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    old = await lead(store, "a")
    await lead(store, "a")
    events: list[object] = []
    store.events.on_finished(events.append)
    cycle = FinishedCycle(
        finished=(done(op(1)),),
        never_received=(op(2, failure=NEVER_RECEIVED),),
        advances=(ModelAdvance(MODEL, 3, state=ModelState.READY),),
        checkpoints=(checkpoint(),),
        sampling_sessions=(sampling_session(),),
        snapshots=(snapshot(1),),
        run_log=(RunLogEntry(MODEL, 1, OpKind.FORWARD_BACKWARD, 1.0, {"loss:sum": 1.0}),),
    )
    with pytest.raises(Fenced):
        await store.cycles.begin(old, 1, [op(1).request_id])
    with pytest.raises(Fenced):
        await store.cycles.finish(old, cycle)
    with pytest.raises(Fenced):
        await store.cycles.finish_samples(old, [done(op(1))])
    with pytest.raises(Fenced):
        await store.snapshots.drop(old, MODEL, 0)
    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.state is RequestState.QUEUED
    assert await store.requests.get(op(2).request_id) is None
    assert await store.models.get(MODEL) == model()
    assert await store.checkpoints.of_model(MODEL) == []
    assert await store.sampling.get(sampling_session().sampling_session_id) is None
    assert await store.snapshots.newest(MODEL) == ()
    assert await store.run_log.read(MODEL) == []
    assert await store.cycles.trained_tokens(TENANT) == 0
    await asyncio.sleep(0)
    assert events == []


async def test_cycle_makes_everything_public_at_once(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1), op(2), op(4)])
    lease = await lead(store)
    events: list[tuple[str, ...]] = []
    store.events.on_finished(events.append)
    clock.advance(3.0)
    log = RunLogEntry(MODEL, 1, OpKind.FORWARD_BACKWARD, 1.0, {"loss:sum": 1.5}, queued_s=0.5, run_s=0.25, cycle=7)
    await store.cycles.finish(
        lease,
        FinishedCycle(
            finished=(done(creation()), done(op(1), b"bytes"), failed(op(2))),
            never_received=(op(3, failure=NEVER_RECEIVED),),
            advances=(ModelAdvance(MODEL, 4, state=ModelState.READY, incarnation=1, changed_seq=1),),
            checkpoints=(checkpoint(),),
            sampling_sessions=(replace(sampling_session(), model_id=MODEL),),
            snapshots=(snapshot(1),),
            run_log=(log,),
        ),
    )
    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.result is not None
    assert (future.result.content_type, future.result.body) == ("application/json", b"bytes")
    ids = [op(n).request_id for n in range(1, 5)]
    states = await store.requests.futures_state(ids)
    assert [states[request_id].value for request_id in ids] == ["done", "failed", "failed", "queued"]
    assert await store.models.get(MODEL) == replace(
        model(),
        next_seq_id=4,
        state=ModelState.READY,
        incarnation=1,
        changed_seq=1,
        last_request_at=clock.now(),
    )
    assert await store.checkpoints.exists(checkpoint().tinker_path)
    assert await store.sampling.get(sampling_session().sampling_session_id) is not None
    assert await store.snapshots.newest(MODEL) == (replace(snapshot(1), created_at=clock.now()),)
    assert await store.run_log.read(MODEL) == [log]
    # Only the pass that succeeded counts.
    assert await store.cycles.trained_tokens(TENANT) == 32
    await asyncio.sleep(0)
    assert events == [tuple(r.request_id for r in (creation(), op(1), op(2), op(3)))]
    assert [[r.seq_id for r in line] for line in await store.requests.heads(POOL)] == [[4]]


async def test_advance_changes_only_what_it_names(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    everything = ModelAdvance(
        MODEL,
        next_seq_id=5,
        state=ModelState.LOST,
        state_message="gone",
        incarnation=3,
        changed_seq=4,
    )
    await store.cycles.finish(lease, FinishedCycle(advances=(everything,)))
    before = await store.models.get(MODEL)
    assert before is not None
    assert (before.state_message, before.incarnation, before.changed_seq) == ("gone", 3, 4)
    await store.cycles.finish(lease, FinishedCycle(advances=(ModelAdvance(MODEL, next_seq_id=6),)))
    assert await store.models.get(MODEL) == replace(before, next_seq_id=6)


async def test_late_arrival_of_a_given_up_request_fails_like_the_others(store: Store) -> None:
    """The request came between planning and commit: it must not stay queued behind its model's back."""
    await with_run(store)
    await store.requests.enqueue(op(1, payload=b"late"))
    lease = await lead(store)
    await store.cycles.finish(
        lease,
        FinishedCycle(never_received=(op(1, failure=NEVER_RECEIVED),), advances=(ModelAdvance(MODEL, 2),)),
    )
    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.failure == NEVER_RECEIVED
    assert [[r.seq_id for r in line] for line in await store.requests.heads(POOL)] == [[0]]


async def test_final_rows_are_left_alone(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(1), b"first"),)))
    events: list[object] = []
    store.events.on_finished(events.append)
    await store.cycles.finish(lease, FinishedCycle(finished=(failed(op(1)), done(op(7)))))
    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.result is not None
    assert future.result.body == b"first"
    await asyncio.sleep(0)
    assert events == []


async def test_usage_adds_up_and_a_repeated_commit_adds_nothing(store: Store) -> None:
    """The answer to a commit may be lost, and the leader commits the same again."""
    await with_run(store)
    requests = [op(1, num_tokens=3), op(2, OpKind.FORWARD, num_tokens=50), op(3, num_tokens=4), op(4, num_tokens=60)]
    await enqueue_all(store, [*requests, op(5, OpKind.OPTIM_STEP, num_tokens=70)])
    lease = await lead(store)
    first = FinishedCycle(finished=(done(requests[0]), done(requests[1])))
    second = FinishedCycle(
        finished=(done(requests[2]), failed(requests[3]), done(op(5))),
        advances=(ModelAdvance(MODEL, 6, changed_seq=5),),
        snapshots=(snapshot(5),),
        checkpoints=(checkpoint(),),
        run_log=(RunLogEntry(MODEL, 3, OpKind.FORWARD_BACKWARD, 1.0, {"loss:sum": 1.0}),),
    )
    await store.cycles.finish(lease, first)
    for _ in range(2):
        await store.cycles.finish(lease, second)
        assert await store.cycles.trained_tokens(TENANT) == 7
        assert [s.seq_id for s in await store.snapshots.newest(MODEL)] == [5]
        assert len(await store.run_log.read(MODEL)) == 1
        assert await store.checkpoints.of_model(MODEL) == [checkpoint()]


async def test_run_log_gives_the_newest_lines_in_order(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    lines = [RunLogEntry(MODEL, n, OpKind.FORWARD_BACKWARD, float(n), {"loss:sum": n / 2}) for n in range(1, 6)]
    await store.cycles.finish(lease, FinishedCycle(run_log=tuple(lines)))
    # An op is logged once.
    await store.cycles.finish(lease, FinishedCycle(run_log=(replace(lines[0], metrics={"loss:sum": 9.0}),)))
    assert await store.run_log.read(MODEL) == lines
    assert await store.run_log.read(MODEL, 2) == lines[-2:]


async def test_metric_that_is_not_finite_fails_the_commit(store: Store) -> None:
    await with_run(store)
    entry = RunLogEntry(MODEL, 1, OpKind.FORWARD_BACKWARD, 1.0, {"loss:sum": float("nan")})
    with pytest.raises(ServerError, match="loss:sum"):
        await store.cycles.finish(await lead(store), FinishedCycle(run_log=(entry,), finished=(done(creation()),)))
    future = await store.requests.future(creation().request_id)
    assert future is not None
    assert future.state is RequestState.QUEUED


async def test_more_rows_than_fit_into_one_query(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.store.request_rows.MAX_IDS_PER_QUERY", 2)
    await with_run(store)
    requests = [op(n) for n in range(1, 8)]
    await asyncio.gather(*(store.requests.enqueue(request) for request in requests))
    await store.cycles.finish(await lead(store), FinishedCycle(finished=tuple(done(r) for r in requests)))
    states = await store.requests.futures_state([request.request_id for request in requests])
    assert list(states.values()) == [RequestState.DONE] * 7
