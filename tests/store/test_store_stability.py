"""What is recorded of sampled sequences: with the sample or not at all, for its own session, for a day."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from store_builders import SESSION, done, failed, lead, sample, session, with_sampler

from treadle.domain.ids import SessionId
from treadle.domain.limits import STABILITY_RECORD_KEPT_S
from treadle.domain.records import FinishedRequest
from treadle.domain.stability import RecordedSequence, recorded
from treadle.errors import Fenced, InvalidRequest
from treadle.store import Store, stability
from treadle.testing.clock import ManualClock


def records(*lengths: int, num_prompt_tokens: int = 3) -> tuple[RecordedSequence, ...]:
    rng = np.random.default_rng(len(lengths))
    return recorded(
        [(rng.integers(0, 2**31 - 1, n).astype(np.int32), -rng.random(n).astype(np.float32)) for n in lengths],
        num_prompt_tokens,
    )


def recording(seq_id: int, kept: tuple[RecordedSequence, ...]) -> FinishedRequest:
    return replace(done(sample(seq_id)), recorded=kept)


def ids_of(seq_id: int, count: int) -> list[str]:
    return [f"{sample(seq_id).request_id}:{index}" for index in range(count)]


async def test_recorded_sequences_are_found_by_their_sample_sequence_ids(store: Store) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    kept = records(4, 0, 2)
    await store.cycles.finish_samples(await lead(store), [recording(1, kept)])

    found = await store.stability.use(SESSION, [*ids_of(1, 3), "nobody", ids_of(1, 1)[0]])
    assert found == dict(zip(ids_of(1, 3), kept, strict=True))
    np.testing.assert_array_equal(found[ids_of(1, 1)[0]].token_ids(), kept[0].token_ids())
    assert found[ids_of(1, 1)[0]].sampling_logprobs().dtype == np.float32
    assert await store.stability.use(SESSION, []) == {}


async def test_another_session_does_not_find_them(store: Store) -> None:
    await with_sampler(store)
    await store.sessions.create(session("s2"), None)
    await store.requests.enqueue(sample(1))
    await store.cycles.finish_samples(await lead(store), [recording(1, records(4))])
    assert await store.stability.use(SessionId("s2"), ids_of(1, 1)) == {}


async def test_a_sample_that_ended_before_records_nothing(store: Store) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    lease = await lead(store)
    await store.cycles.finish_samples(lease, [failed(sample(1))])
    await store.cycles.finish_samples(lease, [recording(1, records(4))])
    assert await store.stability.use(SESSION, ids_of(1, 1)) == {}


async def test_a_commit_that_is_repeated_records_once(store: Store) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    lease = await lead(store)
    for kept in (records(4), records(5, 5)):
        await store.cycles.finish_samples(lease, [recording(1, kept)])
    assert await store.stability.use(SESSION, ids_of(1, 2)) == {ids_of(1, 1)[0]: records(4)[0]}


async def test_a_fenced_commit_records_nothing(store: Store) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    lease = await lead(store)
    with pytest.raises(Fenced):
        await store.cycles.finish_samples(replace(lease, token=lease.token - 1), [recording(1, records(4))])
    assert await store.stability.use(SESSION, ids_of(1, 1)) == {}


async def test_use_starts_the_day_anew(store: Store, clock: ManualClock) -> None:
    await with_sampler(store)
    lease = await lead(store)
    for seq_id in (1, 2):
        await store.requests.enqueue(sample(seq_id))
        await store.cycles.finish_samples(lease, [recording(seq_id, records(4))])
    clock.advance(STABILITY_RECORD_KEPT_S - 100)
    assert await store.stability.use(SESSION, ids_of(1, 1))
    clock.advance(200)
    assert await store.stability.forget(unused_since=clock.now() - STABILITY_RECORD_KEPT_S) == 1
    assert (await store.stability.use(SESSION, [*ids_of(1, 1), *ids_of(2, 1)])).keys() == set(ids_of(1, 1))


async def test_more_than_a_pass_may_read_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await with_sampler(store)
    await store.requests.enqueue(sample(1))
    await store.cycles.finish_samples(await lead(store), [recording(1, records(4, 4))])
    monkeypatch.setattr(stability, "MAX_STABILITY_BYTES_PER_PASS", 8 * 7)
    assert await store.stability.use(SESSION, ids_of(1, 1))
    with pytest.raises(InvalidRequest, match="send fewer datums"):
        await store.stability.use(SESSION, ids_of(1, 2))


async def test_a_number_that_is_sampled_again_when_its_row_was_swept_is_recorded_anew(
    store: Store, clock: ManualClock
) -> None:
    """A record that passes use outlives the row of its sample; the commit of the next one must not trip over it."""
    await with_sampler(store)
    first, second = records(4, 4), records(5)
    await store.requests.enqueue(sample(1))
    await store.cycles.finish_samples(await lead(store), [recording(1, first)])
    await store.requests.acknowledge([sample(1).request_id])
    clock.advance(STABILITY_RECORD_KEPT_S + 100)
    assert await store.stability.use(SESSION, ids_of(1, 1))
    assert (await store.retention.forget_requests(finished_before=clock.now() - 1)).num_forgotten == 1
    await store.requests.enqueue(sample(1))
    await store.cycles.finish_samples(await lead(store), [recording(1, second)])
    assert (await store.stability.use(SESSION, ids_of(1, 1)))[ids_of(1, 1)[0]] == second[0]
