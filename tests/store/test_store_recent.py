"""The memory of recent requests: it saves queries and never tells anything that the table does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_builders import MODEL, lead, op, with_run

from treadle.domain.ids import RequestId
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.records import FinishedCycle, FinishedRequest, FutureRecord, NewRequest
from treadle.domain.states import Category, RequestState
from treadle.store import Store
from treadle.store.recent import RecentFutures

RESULT = EncodedResult("application/json", b"12345")


def done(request: NewRequest) -> FinishedRequest:
    return FinishedRequest(request_id=request.request_id, result=RESULT)


async def from_the_table(store: Store, request_id: RequestId) -> FutureRecord | None:
    """What a process that remembers nothing reads."""
    store.requests._recent.forget([request_id])
    return await store.requests.future(request_id)


async def test_memory_and_table_say_the_same_at_every_stage(store: Store) -> None:
    await with_run(store)
    lease = await lead(store)
    failure = Failure("no", Category.USER)
    refused_at_once = replace(op(3), failure=failure)
    for request in (op(1), op(2), refused_at_once):
        await store.requests.enqueue(request)

    async def remembered_as_stored() -> list[RequestState]:
        states = []
        for request in (op(1), op(2), refused_at_once):
            remembered = store.requests._recent.get(request.request_id)
            assert remembered is not None
            stored = await from_the_table(store, request.request_id)
            assert stored == remembered
            # The table was read without filling the memory; go on as before.
            store.requests._recent._put(remembered)
            states.append(remembered.state)
        return states

    assert await remembered_as_stored() == [RequestState.QUEUED, RequestState.QUEUED, RequestState.FAILED]
    finished = (done(op(1)), FinishedRequest(request_id=op(2).request_id, failure=failure))
    await store.cycles.finish(lease, FinishedCycle(finished=finished))
    assert await remembered_as_stored() == [RequestState.DONE, RequestState.FAILED, RequestState.FAILED]


async def test_what_another_process_finished_is_seen_after_the_poll(store: Store, database_url: str) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    other = await Store.open(database_url)
    await other.cycles.finish(await lead(other), FinishedCycle(finished=(done(op(1)),)))
    await other.close()

    await store.requests.futures_state([op(1).request_id])

    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.result == RESULT


@pytest.mark.parametrize("way", ["acknowledged", "swept"])
async def test_a_dropped_result_is_expired_here_too(store: Store, way: str) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    await store.cycles.finish(await lead(store), FinishedCycle(finished=(done(op(1)),)))
    if way == "acknowledged":
        await store.requests.acknowledge([op(1).request_id])
    else:
        assert await store.requests.sweep(delivered_before=0, undelivered_before=float("inf")) == 1

    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.is_expired


async def test_a_replay_does_not_revive_what_is_over(store: Store) -> None:
    await with_run(store)
    assert await store.requests.add(op(1)) is True
    await store.cycles.finish(await lead(store), FinishedCycle(finished=(done(op(1)),)))
    assert await store.requests.add(op(1)) is False
    future = await store.requests.future(op(1).request_id)
    assert future is not None
    assert future.state is RequestState.DONE


def test_memory_is_bounded_in_entries_and_in_bytes() -> None:
    recent = RecentFutures(max_entries=3, max_result_bytes=10)
    for seq_id in range(1, 5):
        recent.admitted(op(seq_id))
    assert [recent.get(op(n).request_id) is not None for n in range(1, 5)] == [False, True, True, True]
    for seq_id in (2, 3, 4):
        recent.finished([done(op(seq_id))], [op(seq_id).request_id])
    # Two results of 5 bytes fit.
    assert [recent.get(op(n).request_id) is not None for n in range(1, 5)] == [False, False, True, True]
    recent.forget([op(3).request_id, op(4).request_id])
    recent.admitted(op(5))
    recent.finished([done(op(5))], [op(5).request_id])
    assert recent.get(op(5).request_id) is not None


def test_an_outcome_that_was_not_committed_is_not_told() -> None:
    recent = RecentFutures()
    recent.admitted(op(1))
    recent.finished([done(op(1))], [])
    known = recent.get(op(1).request_id)
    assert known is not None
    assert known.state is RequestState.QUEUED
    assert known.request_id.startswith(MODEL)
