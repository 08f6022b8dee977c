"""Admission, queue heads and futures."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from store_builders import (
    MODEL,
    OTHER_TENANT,
    POOL,
    REFUSED,
    SAMPLER,
    TENANT,
    count_queued,
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
    with_sampler,
)

from treadle.domain.ids import ModelId, PoolName, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle, FinishedRequest, ModelAdvance
from treadle.domain.states import Category, RequestState
from treadle.errors import InvalidRequest, ServerError
from treadle.store import Store
from treadle.testing.clock import ManualClock


async def test_enqueued_request_is_read_back_whole(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    clock.advance(5.0)
    request = op(1, payload=b"\x00\xff")
    assert await store.requests.enqueue(request) == request.request_id
    record = await store.requests.get(request.request_id)
    assert record is not None
    assert record.state is RequestState.QUEUED
    assert record.created_at == clock.now()
    for field in ("request_id", "tenant_id", "pool", "kind", "seq_id", "num_tokens", "quantum_tokens", "model_id"):
        assert getattr(record, field) == getattr(request, field)
    assert await store.requests.payload(request.request_id) == (b"\x00\xff", None)


async def test_large_payload_is_named_by_its_blob(store: Store) -> None:
    await with_run(store)
    request = op(1, payload=b"", payload_key="payloads/1")
    await store.requests.enqueue(request)
    assert await store.requests.payload(request.request_id) == (b"", "payloads/1")


async def test_retried_submit_returns_the_first_request(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1, payload=b"first"))
    again = await store.requests.enqueue(op(1, payload=b"second", num_tokens=99))
    record = await store.requests.get(again)
    assert record is not None
    assert (record.kind, record.num_tokens) == (OpKind.FORWARD_BACKWARD, 32)
    assert (await store.requests.payload(again))[0] == b"first"


async def test_retry_of_another_kind_is_refused(store: Store) -> None:
    """It would get the result of the first one."""
    await with_run(store)
    await store.requests.enqueue(op(1))
    for kind in (OpKind.OPTIM_STEP, OpKind.FORWARD):
        with pytest.raises(InvalidRequest, match="seq_id 1 is taken by a request of kind forward_backward"):
            await store.requests.enqueue(op(1, kind))
    # So does one that is refused for another reason, whose error would come through the first one's future.
    with pytest.raises(InvalidRequest, match="taken"):
        await store.requests.enqueue(op(1, OpKind.OPTIM_STEP, failure=REFUSED))
    with pytest.raises(InvalidRequest, match="seq_id 0 is taken by a request of kind create_model"):
        await store.requests.enqueue(op(0))
    assert await count_queued(store, TENANT) == (2, 32)


async def test_contradictory_retry_disturbs_nobody_in_its_group(store: Store) -> None:
    await with_run(store)
    answers = await asyncio.gather(
        *(store.requests.add(op(1, kind)) for kind in (OpKind.OPTIM_STEP, OpKind.FORWARD, OpKind.OPTIM_STEP)),
        store.requests.add(op(2)),
        return_exceptions=True,
    )
    assert [answer if isinstance(answer, bool) else type(answer) for answer in answers] == [
        True,
        InvalidRequest,
        False,
        True,
    ]


async def test_retry_of_a_refused_request_hears_the_first_reason(store: Store) -> None:
    """A pass that could not be read, or an id that was given up: its kind may be unknown."""
    await with_run(store)
    await store.requests.enqueue(op(1, failure=REFUSED))
    await store.requests.enqueue(op(2, OpKind.FORWARD))
    assert await store.requests.add(op(1, OpKind.FORWARD)) is False
    assert await store.requests.add(op(1, OpKind.OPTIM_STEP)) is False
    assert await store.requests.add(op(2, OpKind.FORWARD_BACKWARD, failure=REFUSED)) is False
    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.failure == REFUSED


async def test_log_is_what_was_done_to_the_state(store: Store) -> None:
    await with_run(store)
    kinds = [
        OpKind.FORWARD_BACKWARD,
        OpKind.FORWARD,
        OpKind.FORWARD_BACKWARD,
        OpKind.OPTIM_STEP,
        OpKind.SAVE_WEIGHTS,
        OpKind.FORWARD_BACKWARD,
        OpKind.OPTIM_STEP,
    ]
    requests = [op(n, kind, num_tokens=n) for n, kind in enumerate(kinds, start=1)]
    await enqueue_all(store, [*requests, op(8), op(9, failure=REFUSED)])
    finished = [failed(r) if r.seq_id == 3 else done(r) for r in requests]
    await store.cycles.finish(
        await lead(store), FinishedCycle(finished=tuple(finished), advances=(ModelAdvance(MODEL, 8),))
    )
    log = await store.requests.log(MODEL, after=0, before=8)
    assert [(r.seq_id, r.kind, r.num_tokens) for r in log] == [
        (seq_id, kinds[seq_id - 1], seq_id) for seq_id in (1, 4, 6, 7)
    ]
    assert {r.state for r in log} == {RequestState.DONE}
    assert log[0].quantum_tokens == (1,)
    assert [r.seq_id for r in await store.requests.log(MODEL, after=1, before=7)] == [4, 6]
    assert [r.seq_id for r in await store.requests.log(MODEL, after=0, before=8, limit=2)] == [1, 4]
    assert await store.requests.log(ModelId("nobody"), after=0, before=8) == []


async def test_failed_passes_are_told_since_the_newest_step(store: Store) -> None:
    await with_run(store)
    requests = [op(n) for n in (1, 2, 4, 6)] + [op(n, OpKind.OPTIM_STEP) for n in (3, 7)] + [op(5, OpKind.FORWARD)]
    await enqueue_all(store, [*requests, op(8, failure=REFUSED)])
    lease = await lead(store)

    async def finish(*finished: FinishedRequest) -> set[int]:
        await store.cycles.finish(lease, FinishedCycle(finished=finished))
        return await store.requests.failed_passes_since_step(MODEL)

    assert await finish(failed(op(1)), done(op(2))) == {1, 8}
    assert await finish(done(op(3)), failed(op(4)), failed(op(5)), done(op(6))) == {4, 8}
    # A step that failed told nobody.
    assert await finish(failed(op(7))) == {4, 8}


async def test_a_load_ends_the_count_of_failed_passes(store: Store) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1), op(2, OpKind.LOAD_WEIGHTS), op(3), op(4, OpKind.LOAD_WEIGHTS)])
    lease = await lead(store)
    ends = (failed(op(1)), done(op(2)), failed(op(3)), failed(op(4)))
    await store.cycles.finish(lease, FinishedCycle(finished=ends))
    # The load that failed replaced no gradient.
    assert await store.requests.failed_passes_since_step(MODEL) == {3}


async def test_payload_is_counted_wherever_it_lies(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1, payload=b"1234"))
    await store.requests.enqueue(replace(op(2, payload=b"", payload_key="payloads/2"), payload_bytes=10**6))
    line = await store.requests.heads(POOL)
    assert [r.payload_bytes for r in line[0]] == [len(b"payload"), 4, 10**6]


async def test_replay_of_a_finished_request_changes_nothing(store: Store) -> None:
    await with_run(store)
    request = op(1)
    await store.requests.enqueue(request)
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(request),)))
    await store.requests.enqueue(request)
    future = await store.requests.future(request.request_id)
    assert future is not None
    assert future.state is RequestState.DONE


async def test_concurrent_copies_of_one_request_make_one_row_and_one_event(store: Store) -> None:
    await with_run(store)
    seen: list[OpKind] = []
    store.events.on_enqueued(lambda _pool, kind: seen.append(kind))
    ids = await asyncio.gather(*(store.requests.enqueue(op(1, payload=bytes([n]))) for n in range(20)))
    assert set(ids) == {f"{MODEL}:1"}
    assert await count_queued(store, TENANT) == (2, 32)
    assert (await store.requests.payload(ids[0]))[0] == b"\x00"
    await asyncio.sleep(0)
    assert seen == [OpKind.FORWARD_BACKWARD]


async def test_refused_request_is_a_failed_row(store: Store) -> None:
    await with_run(store)
    request = op(1, failure=REFUSED)
    await store.requests.enqueue(request)
    future = await store.requests.future(request.request_id)
    assert future is not None
    assert (future.state, future.failure, future.result) == (RequestState.FAILED, REFUSED, None)
    assert future.tenant_id == TENANT
    assert not future.is_expired
    assert await count_queued(store, TENANT) == (1, 0)


async def test_seq_id_beyond_the_column_is_refused(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(2**63 - 1))
    with pytest.raises(InvalidRequest, match="out of range"):
        await store.requests.enqueue(op(2**63))


async def test_two_requests_cannot_share_a_seq_id(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    intruder = op(1)
    object.__setattr__(intruder, "request_id", RequestId("another id"))
    with pytest.raises(ServerError, match="contradict"):
        await store.requests.enqueue(intruder)


async def test_request_without_a_run_is_refused(store: Store) -> None:
    with pytest.raises(ServerError, match="contradict"):
        await store.requests.enqueue(op(1))


async def test_logged_errors_show_no_payload(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServerError) as caught:
        await store.requests.enqueue(op(1, payload=b"a secret prompt", model_id="a secret run"))
    assert "database failed" in caplog.text
    assert "secret" not in caplog.text
    assert "INSERT" not in str(caught.value)


async def test_unknown_future_and_payload(store: Store) -> None:
    assert await store.requests.future(RequestId("nobody")) is None
    assert await store.requests.get(RequestId("nobody")) is None
    assert await store.requests.payload(RequestId("nobody")) == (b"", None)


async def test_payloads_and_states_of_many_come_at_once(store: Store) -> None:
    await with_run(store)
    await enqueue_all(store, [op(n, payload=bytes([n])) for n in range(1, 4)])
    await store.requests.enqueue(op(4, failure=REFUSED))
    ids = [f"{MODEL}:{n}" for n in range(1, 6)]
    assert await store.requests.payloads(ids) == {
        f"{MODEL}:1": (b"\x01", None),
        f"{MODEL}:2": (b"\x02", None),
        f"{MODEL}:3": (b"\x03", None),
        f"{MODEL}:4": (b"", None),
    }
    states = await store.requests.futures_state(ids)
    assert [states.get(RequestId(i)) for i in ids] == [*[RequestState.QUEUED] * 3, RequestState.FAILED, None]


async def test_heads_are_the_lowest_seq_ids_of_each_model(store: Store) -> None:
    await with_run(store, MODEL, "s1:train:1")
    # The SDK sends the first chunk of a call last, so rows come out of order.
    await enqueue_all(store, [op(n) for n in (5, 3, 4, 1, 2)])
    await enqueue_all(store, [op(n, model_id="s1:train:1") for n in (2, 1)])
    heads = await store.requests.heads(POOL, 3)
    assert [[r.seq_id for r in line] for line in heads] == [[0, 1, 2], [0, 1, 2]]
    assert [{r.model_id for r in line} for line in heads] == [{MODEL}, {ModelId("s1:train:1")}]


async def test_heads_leave_out_other_pools_and_samples(store: Store) -> None:
    await with_run(store)
    await store.sampling.create(sampling_session())
    await store.requests.enqueue(sample(1))
    assert [[r.kind for r in line] for line in await store.requests.heads(POOL)] == [[OpKind.CREATE_MODEL]]
    assert await store.requests.heads(PoolName("other")) == []


async def test_refused_op_stays_in_line_until_its_model_passed_it(store: Store) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1, failure=REFUSED), op(2), op(3, failure=REFUSED)])
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(creation()),), advances=(ModelAdvance(MODEL, 1),)))
    (line,) = await store.requests.heads(POOL)
    assert [(r.seq_id, r.state.value) for r in line] == [(1, "failed"), (2, "queued"), (3, "failed")]
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(2)),), advances=(ModelAdvance(MODEL, 3),)))
    (line,) = await store.requests.heads(POOL)
    assert [r.seq_id for r in line] == [3]
    await store.cycles.finish(lease, FinishedCycle(advances=(ModelAdvance(MODEL, 4),)))
    assert await store.requests.heads(POOL) == []


async def test_advance_past_a_queued_row_leaves_it_in_line(store: Store) -> None:
    """A line may lose finished rows only: a queued one that was skipped by mistake must stay visible."""
    await with_run(store)
    await store.requests.enqueue(op(1))
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(creation()),), advances=(ModelAdvance(MODEL, 9),)))
    (line,) = await store.requests.heads(POOL)
    assert [r.seq_id for r in line] == [1]


async def test_refused_creation_has_no_line(store: Store) -> None:
    await store.sessions.create(session(), None)
    await store.models.create(model(), creation(failure=REFUSED))
    assert await store.requests.heads(POOL) == []


async def test_queued_samples_come_in_arrival_order(store: Store) -> None:
    await with_sampler(store)
    await enqueue_all(store, [sample(n) for n in (3, 1, 2)])
    await store.requests.enqueue(sample(4, failure=REFUSED))
    assert [r.seq_id for r in await store.requests.queued_samples(POOL)] == [3, 1, 2]
    assert [r.seq_id for r in await store.requests.queued_samples(POOL, 2)] == [3, 1]
    assert (await store.requests.queued_samples(POOL))[0].sampling_session_id == SAMPLER


async def test_queued_samples_let_tenants_take_turns(store: Store) -> None:
    await with_sampler(store)
    await enqueue_all(store, [sample(n) for n in (1, 2, 3)])
    await enqueue_all(store, [replace(sample(n), tenant_id=OTHER_TENANT) for n in (11, 12)])
    assert [r.seq_id for r in await store.requests.queued_samples(POOL)] == [1, 11, 2, 12, 3]
    assert [r.seq_id for r in await store.requests.queued_samples(POOL, 2)] == [1, 11]


async def test_what_waits_is_counted_per_tenant(store: Store) -> None:
    await with_run(store)
    await store.models.create(model("s1:train:7", tenant=OTHER_TENANT), creation("s1:train:7", tenant=OTHER_TENANT))
    await enqueue_all(store, [op(1, num_tokens=10), op(2, num_tokens=20)])
    await store.requests.enqueue(op(1, model_id="s1:train:7", tenant=OTHER_TENANT, num_tokens=5))
    assert await count_queued(store, TENANT) == (3, 30)
    assert await count_queued(store, OTHER_TENANT) == (2, 5)
    assert await count_queued(store) == (5, 35)


async def test_known_seq_ids_counts_every_state(store: Store) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1), op(3, failure=REFUSED), op(4), op(9)])
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(failed(op(4)),)))
    assert await store.requests.known_seq_ids(MODEL, 1, 8) == {1, 3, 4}
    assert await store.requests.known_seq_ids(ModelId("nobody"), 1, 8) == set()


async def test_acknowledged_result_is_expired_but_remembered(store: Store) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1), op(2), op(3)])
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(1)), failed(op(2)))))
    await store.requests.acknowledge([RequestId(f"{MODEL}:{n}") for n in (1, 2, 3, 99)])
    futures = [await store.requests.future(RequestId(f"{MODEL}:{n}")) for n in (1, 2, 3)]
    assert [(f.state.value, f.is_expired) for f in futures if f] == [
        ("done", True),
        ("failed", False),
        ("queued", False),
    ]
    assert futures[1] is not None
    assert futures[1].failure is not None
    assert futures[1].failure.category is Category.USER


async def test_sweep_drops_delivered_results_before_undelivered_ones(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1), op(2)])
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(1)), done(op(2)))))
    first, second = RequestId(f"{MODEL}:1"), RequestId(f"{MODEL}:2")
    clock.advance(100.0)
    await store.requests.mark_delivered([first])
    clock.advance(10.0)
    # A second delivery does not start the time anew.
    await store.requests.mark_delivered([first])

    now = clock.now()
    assert await store.requests.sweep(delivered_before=now - 10.0, undelivered_before=now - 110.0) == 0
    assert await store.requests.sweep(delivered_before=now - 9.0, undelivered_before=now - 110.0) == 1
    assert await is_expired(store, first)
    assert not await is_expired(store, second)
    assert await store.requests.sweep(delivered_before=now, undelivered_before=now - 109.0) == 1
    assert await is_expired(store, second)


async def test_events_tell_of_new_rows_only_and_stop_when_asked(store: Store) -> None:
    await with_run(store)
    await store.sampling.create(sampling_session())
    enqueued: list[tuple[str, str]] = []
    finished: list[tuple[str, ...]] = []
    stop_enqueued = store.events.on_enqueued(lambda pool, kind: enqueued.append((pool, kind.value)))
    stop_finished = store.events.on_finished(finished.append)
    await enqueue_all(store, [op(1), op(1), op(2, failure=REFUSED), sample(1), sample(2, failure=REFUSED)])
    await asyncio.sleep(0)
    # A refused op may close a hole; a refused sample makes nothing runnable.
    assert enqueued == [(POOL, "forward_backward")] * 2 + [(POOL, "sample")]
    assert finished == [(f"{MODEL}:2",), (f"{SAMPLER}:2",)]
    stop_enqueued()
    stop_finished()
    stop_finished()
    await enqueue_all(store, [op(3), op(4, failure=REFUSED)])
    await asyncio.sleep(0)
    assert (len(enqueued), len(finished)) == (3, 2)


async def is_expired(store: Store, request_id: RequestId) -> bool:
    future = await store.requests.future(request_id)
    assert future is not None
    return future.is_expired
