"""What a trace is made from: requests while their rows are there, the run log behind that."""

from __future__ import annotations

from store_builders import (
    MODEL,
    SAMPLER,
    SESSION,
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
    with_run,
)

from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle, ModelAdvance, RunLogEntry
from treadle.domain.states import RequestState
from treadle.store import Store
from treadle.store.traces import TracedOp
from treadle.testing.clock import ManualClock


def entry(seq_id: int, at: float, *, cycle: int = 3) -> RunLogEntry:
    return RunLogEntry(
        MODEL, seq_id, OpKind.FORWARD_BACKWARD, at, {"num_tokens": 32.0}, queued_s=1.0, run_s=2.0, cycle=cycle
    )


async def test_ops_and_samples_of_a_session_with_their_times(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await store.sampling.create(sampling_session())
    began = clock.now()
    await enqueue_all(store, [op(1), op(2), sample(1), sample(2)])
    clock.advance(3.0)
    lease = await lead(store)
    ended = clock.now()
    cycle = FinishedCycle(finished=(done(creation()), done(op(1)), failed(op(2))), run_log=(entry(1, ended),))
    await store.cycles.finish(lease, cycle)
    await store.cycles.finish_samples(lease, [done(sample(1))])

    trace = await store.traces.of_session(SESSION)

    assert not trace.is_cut
    by_owner = {(op.owner, op.seq_id): op for op in trace.ops}
    assert by_owner[MODEL, 1] == TracedOp(
        owner=MODEL,
        pool=model().pool,
        kind=OpKind.FORWARD_BACKWARD,
        state=RequestState.DONE,
        seq_id=1,
        num_tokens=32,
        queued_at=began,
        sent_at=ended - 2.0,
        finished_at=ended,
        cycle=3,
    )
    refused = by_owner[MODEL, 2]
    assert (refused.state, refused.sent_at, refused.cycle) == (RequestState.FAILED, None, None)
    assert by_owner[SAMPLER, 1].finished_at == ended
    assert by_owner[SAMPLER, 2].state is RequestState.QUEUED
    assert by_owner[SAMPLER, 2].finished_at is None
    assert len(trace.ops) == 5


async def test_what_is_forgotten_is_known_from_the_run_log(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1, OpKind.FORWARD)])
    clock.advance(3.0)
    ended = clock.now()
    advance = ModelAdvance(MODEL, 2, changed_seq=1)
    cycle = FinishedCycle(finished=(done(creation()), failed(op(1))), advances=(advance,), run_log=(entry(1, ended),))
    await store.cycles.finish(await lead(store), cycle)
    clock.advance(1e6)
    await store.retention.forget_requests(finished_before=clock.now(), after_row=0)
    assert await store.requests.get(op(1).request_id) is None

    trace = await store.traces.of_session(SESSION)

    [traced] = [op for op in trace.ops if op.seq_id == 1]
    assert (traced.queued_at, traced.sent_at, traced.finished_at) == (ended - 3.0, ended - 2.0, ended)
    assert (traced.seq_id, traced.num_tokens, traced.cycle) == (1, 32, 3)


async def test_sessions_do_not_see_each_other(store: Store) -> None:
    await with_run(store)
    await store.sessions.create(session("s2"))
    await enqueue_all(store, [op(1)])

    assert (await store.traces.of_session(session("s2").session_id)).ops == ()
    assert len((await store.traces.of_session(SESSION)).ops) == 2
