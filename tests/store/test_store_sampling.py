"""Sampling sessions and the order in which samples come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_builders import (
    MODEL,
    REFUSED,
    SAMPLER,
    SESSION,
    done,
    enqueue_all,
    failed,
    lead,
    sample,
    sampling_session,
    session,
    with_run,
    with_sampler,
)

from treadle.domain.ids import BlobKey, SamplingSessionId
from treadle.domain.records import FinishedCycle
from treadle.domain.states import RequestState
from treadle.errors import NotFound
from treadle.store import Completion, Store
from treadle.testing.clock import ManualClock

CLONE = 1_000_000_000


async def test_replayed_sampling_session_is_the_first_one(store: Store) -> None:
    await store.sessions.create(session(), None)
    first = await store.sampling.create(sampling_session())
    assert await store.sampling.create(sampling_session(base_model="other")) == first == sampling_session()
    assert await store.sampling.get(SAMPLER) == first
    assert await store.sampling.of_session(SESSION) == [first]
    assert await store.sampling.get(SamplingSessionId("nobody")) is None


async def test_version_of_a_run_is_read_back_whole(store: Store) -> None:
    await with_run(store)
    version = replace(sampling_session(), blob_key=BlobKey("states/1"), model_id=MODEL, seq_id=7)
    await store.cycles.finish(await lead(store), FinishedCycle(sampling_sessions=(version,)))
    assert await store.sampling.get(SAMPLER) == version
    dropped = replace(version, sampling_session_id=SamplingSessionId("s1:sample:1"), is_dropped=True)
    assert await store.sampling.create(dropped) == dropped


async def test_the_newest_published_weights_are_those_of_the_newest_inflight_save(store: Store) -> None:
    await with_run(store)
    assert await store.sampling.newest_version(MODEL, from_seq_id=0) is None
    kinds = {3: True, 5: True, 7: False, 9: True}
    versions = {
        seq_id: replace(
            sampling_session(f"s1:sample:{seq_id}"),
            blob_key=BlobKey(f"states/{seq_id}"),
            model_id=MODEL,
            seq_id=seq_id,
            is_inflight=is_inflight,
            is_dropped=seq_id == 9,
        )
        for seq_id, is_inflight in kinds.items()
    }
    # Not in their order: what was saved later may become visible first on another connection.
    for seq_id in (5, 3, 7, 9):
        assert await store.sampling.create(versions[seq_id]) == versions[seq_id]
    assert await store.sampling.newest_version(MODEL, from_seq_id=0) == versions[5]
    assert await store.sampling.newest_version(MODEL, from_seq_id=5) == versions[5]
    assert await store.sampling.newest_version(MODEL, from_seq_id=6) is None


async def test_use_of_a_version_is_noted_with_its_samples(store: Store, clock: ManualClock) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    used_at = "SELECT last_used_at FROM sampling_sessions"
    assert await store._database.read(lambda conn: conn.exec_driver_sql(used_at).scalar_one()) == 1.0
    clock.advance(5.0)
    await store.cycles.finish_samples(await lead(store), [done(sample(1))])
    assert await store._database.read(lambda conn: conn.exec_driver_sql(used_at).scalar_one()) == clock.now()


async def test_clients_are_counted_from_one(store: Store) -> None:
    await with_sampler(store)
    assert [await store.sampling.next_client_counter(SAMPLER) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(NotFound):
        await store.sampling.next_client_counter(SamplingSessionId("nobody"))


async def test_completions_come_in_the_order_of_commits(store: Store) -> None:
    await with_sampler(store)
    await enqueue_all(store, [sample(n) for n in range(1, 6)])
    lease = await lead(store)
    await store.cycles.finish_samples(lease, [done(sample(3), b"333"), failed(sample(1))])
    await store.requests.enqueue(sample(9, failure=REFUSED))
    await store.cycles.finish_samples(lease, [done(sample(2), b"22")])
    expected = [
        Completion(1, sample(3).request_id, RequestState.DONE, 3),
        Completion(2, sample(1).request_id, RequestState.FAILED, None),
        Completion(3, sample(9).request_id, RequestState.FAILED, None),
        Completion(4, sample(2).request_id, RequestState.DONE, 2),
    ]
    assert await store.sampling.completions(SAMPLER, after=0) == expected
    assert await store.sampling.completions(SAMPLER, after=2) == expected[2:]
    assert await store.sampling.completions(SAMPLER, after=1, limit=2) == expected[1:3]
    assert await store.sampling.completions(SAMPLER, after=4) == []


async def test_each_clone_sees_its_own_completions(store: Store) -> None:
    await with_sampler(store)
    requests = [sample(1), sample(CLONE - 1), sample(7 * CLONE), sample(7 * CLONE + 1), sample(8 * CLONE)]
    await enqueue_all(store, requests)
    await store.cycles.finish_samples(await lead(store), [done(request) for request in requests])

    async def seq_ids(clone: int) -> list[str]:
        found = await store.sampling.completions(SAMPLER, after=0, cloned_sampler_id=clone)
        return [completion.request_id for completion in found]

    assert await seq_ids(0) == [r.request_id for r in requests[:2]]
    assert await seq_ids(7) == [r.request_id for r in requests[2:4]]
    assert await seq_ids(8) == [requests[4].request_id]
    assert await seq_ids(1) == []


async def test_sessions_number_their_completions_apart(store: Store) -> None:
    await with_sampler(store)
    other = SamplingSessionId("s1:sample:1")
    await store.sampling.create(sampling_session(other))
    requests = [sample(1), sample(1, sampler=other), sample(2), sample(2, sampler=other)]
    await enqueue_all(store, requests)
    await store.cycles.finish_samples(await lead(store), [done(request) for request in reversed(requests)])
    for sampler in (SAMPLER, other):
        found = await store.sampling.completions(sampler, after=0)
        assert [(c.position, c.request_id) for c in found] == [(1, f"{sampler}:2"), (2, f"{sampler}:1")]


async def test_transient_failure_is_marked_for_resubmission(store: Store) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    outcome = failed(sample(1), "the worker went away")
    object.__setattr__(outcome, "is_transient", True)
    await store.cycles.finish_samples(await lead(store), [outcome])
    future = await store.requests.future(sample(1).request_id)
    assert future is not None
    assert future.is_transient
