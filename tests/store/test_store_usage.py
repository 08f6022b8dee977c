"""Usage per hour: what is counted, once, and to whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_builders import (
    OTHER_TENANT,
    SESSION,
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
    session,
    with_run,
)

from treadle.domain.ids import DEFAULT_PROJECT, CheckpointKind, TenantId
from treadle.domain.limits import MAX_USAGE_WINDOW_S, USAGE_KEPT_S
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle
from treadle.domain.usage import HOUR_S, SampleUsage, StorageRecord, UsageKind, hour_of
from treadle.errors import Fenced
from treadle.store import Store
from treadle.testing.clock import ManualClock

FOREVER = 2**40


async def amounts(store: Store, tenant: TenantId = TENANT) -> dict[UsageKind, float]:
    """What a tenant used of each kind, in all hours."""
    totals: dict[UsageKind, float] = {}
    for record in await store.usage.events(tenant, since=0, before=FOREVER) or ():
        totals[record.kind] = totals.get(record.kind, 0.0) + record.amount
    return totals


async def test_passes_count_their_tokens_for_the_session_of_their_run(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    passes = [op(1, num_tokens=10), op(2, OpKind.FORWARD, num_tokens=5), op(4, num_tokens=100)]
    await enqueue_all(store, [*passes, op(3, OpKind.OPTIM_STEP, num_tokens=0)])
    lease = await lead(store)

    step = done(op(3, OpKind.OPTIM_STEP))
    await store.cycles.finish(
        lease, FinishedCycle(finished=(done(passes[0]), done(passes[1]), step, failed(passes[2])))
    )

    [record] = await store.usage.events(TENANT, since=0, before=FOREVER) or []
    assert (record.kind, record.amount) == (UsageKind.TRAINING, 15)
    assert (record.session_id, record.base_model) == (SESSION, "treadle/tiny")
    assert record.bucket_start == hour_of(clock.now())


async def test_a_commit_that_is_repeated_counts_once(store: Store) -> None:
    await with_run(store)
    save = op(2, OpKind.SAVE_WEIGHTS, num_tokens=0)
    await enqueue_all(store, [op(1), save])
    lease = await lead(store)
    saved = checkpoint(seq_id=2)

    cycle = FinishedCycle(finished=(done(op(1)), done(save)), checkpoints=(saved,))
    for _ in range(3):
        await store.cycles.finish(lease, cycle)

    assert await amounts(store) == {UsageKind.TRAINING: 32, UsageKind.CHECKPOINT: 1}


async def test_a_fenced_commit_counts_nothing(store: Store) -> None:
    await with_run(store)
    await enqueue_all(store, [op(1)])
    old = await lead(store, "a")
    await lead(store, "a")

    with pytest.raises(Fenced):
        await store.cycles.finish(old, FinishedCycle(finished=(done(op(1)),)))

    assert await amounts(store) == {}


async def test_a_save_without_a_checkpoint_is_none(store: Store) -> None:
    """An unnamed version for sampling is no checkpoint, nor is a checkpoint whose save was refused."""
    await with_run(store)
    unnamed, named = op(1, OpKind.SAVE_FOR_SAMPLER, num_tokens=0), op(2, OpKind.SAVE_WEIGHTS, num_tokens=0)
    await enqueue_all(store, [unnamed, named])

    cycle = FinishedCycle(finished=(done(unnamed), failed(named)), checkpoints=(checkpoint(seq_id=2),))
    await store.cycles.finish(await lead(store), cycle)

    assert await amounts(store) == {}


async def test_samples_count_prompts_and_tokens_apart(store: Store) -> None:
    await store.sessions.create(session())
    await store.sampling.create(sampling_session())
    await enqueue_all(store, [sample(1), sample(2), sample(3)])
    lease = await lead(store)
    first = replace(
        done(sample(1)), usage=SampleUsage(num_prompt_tokens=100, num_sampled_tokens=7, num_cached_tokens=64)
    )
    second = replace(done(sample(2)), usage=SampleUsage(num_prompt_tokens=10, num_sampled_tokens=1))
    lost = failed(sample(3))

    for _ in range(2):
        await store.cycles.finish_samples(lease, [first, second, lost])

    assert await amounts(store) == {
        UsageKind.PREFILL: 46,
        UsageKind.PREFILL_CACHED: 64,
        UsageKind.SAMPLED: 8,
    }
    records = await store.usage.events(TENANT, since=0, before=FOREVER) or []
    assert {(record.session_id, record.base_model) for record in records} == {(SESSION, "treadle/tiny")}


async def test_hours_are_apart_and_ordered_and_tenants_see_their_own(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    await store.sessions.create(session("s2", tenant=OTHER_TENANT))
    other = "s2:train:0"
    await store.models.create(model(other, session_id="s2", tenant=OTHER_TENANT), creation(other, tenant=OTHER_TENANT))
    foreign = op(1, model_id=other, num_tokens=7, tenant=OTHER_TENANT)
    await enqueue_all(store, [op(1, num_tokens=1), op(2, num_tokens=2), op(3, num_tokens=4), foreign])
    lease = await lead(store)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(1)), done(foreign))))
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(2)),)))
    first_hour = hour_of(clock.now())
    clock.advance(HOUR_S)
    await store.cycles.finish(lease, FinishedCycle(finished=(done(op(3)),)))

    records = await store.usage.events(TENANT, since=0, before=FOREVER) or []

    assert [(record.bucket_start, record.amount) for record in records] == [(first_hour, 3), (first_hour + HOUR_S, 4)]
    within = await store.usage.events(TENANT, since=first_hour, before=first_hour + HOUR_S) or []
    assert [record.amount for record in within] == [3]
    assert await amounts(store, OTHER_TENANT) == {UsageKind.TRAINING: 7}


async def saved_at(
    store: Store, name: str, created_at: float, *, expires_at: float | None = None, **changes: int
) -> None:
    record = replace(checkpoint(name, created_at=created_at, expires_at=expires_at), **changes)  # type: ignore[arg-type]
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(record,)))


async def test_storage_is_bytes_times_the_seconds_of_the_hour(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    begin = hour_of(clock.now())
    clock.advance(HOUR_S)
    await saved_at(store, "before", begin - 5.0)
    await saved_at(store, "in-the-middle", begin + 600.0)
    await saved_at(store, "short", begin + 600.0, expires_at=begin + 700.0)
    await saved_at(store, "expired", begin - 50.0, expires_at=begin - 1.0)
    await saved_at(store, "after", begin + HOUR_S + 1.0)

    await store.usage.accrue_storage(begin)

    [record] = await store.usage.events(TENANT, since=0, before=FOREVER) or []
    assert (record.kind, record.bucket_start) == (UsageKind.STORAGE, begin)
    assert record.amount == 10 * HOUR_S + 10 * (HOUR_S - 600) + 10 * 100
    assert (record.session_id, record.base_model) == (SESSION, "treadle/tiny")


async def test_an_hour_of_storage_is_written_once(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    begin = hour_of(clock.now())
    await saved_at(store, "a", begin - 5.0)
    clock.advance(HOUR_S)

    assert await store.usage.first_hour_to_accrue() == begin - HOUR_S
    for hour in (begin - HOUR_S, begin, begin):
        await store.usage.accrue_storage(hour)

    assert (await amounts(store))[UsageKind.STORAGE] == 10 * HOUR_S + 10 * 5
    assert await store.usage.first_hour_to_accrue() == begin + HOUR_S


async def test_after_a_long_pause_no_more_than_the_window_is_caught_up(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    assert await store.usage.first_hour_to_accrue() == hour_of(clock.now())
    await saved_at(store, "a", clock.now())

    clock.advance(2 * MAX_USAGE_WINDOW_S)

    assert await store.usage.first_hour_to_accrue() == hour_of(clock.now() - MAX_USAGE_WINDOW_S)


async def test_old_usage_is_forgotten_a_day_at_a_time(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    lease = await lead(store)
    await enqueue_all(store, [op(1), op(2), op(3)])
    for seq_id in (1, 2, 3):
        await store.cycles.finish(lease, FinishedCycle(finished=(done(op(seq_id)),)))
        clock.advance(2 * 24 * HOUR_S)
    assert await store.usage.forget() == 0

    clock.advance(USAGE_KEPT_S - 3 * 24 * HOUR_S)

    assert [await store.usage.forget() for _ in range(3)] == [1, 1, 0]
    assert await amounts(store) == {UsageKind.TRAINING: 32}


async def test_what_checkpoints_take_now_by_project(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    bare = "s2:train:0"
    await store.sessions.create(replace(session("s2"), project_id=None))
    await store.models.create(model(bare, session_id="s2"), creation(bare))
    await saved_at(store, "a", clock.now())
    await saved_at(store, "b", clock.now(), size_bytes=5)
    await saved_at(store, "expired", clock.now(), expires_at=clock.now())
    in_none = replace(
        checkpoint("c", kind=CheckpointKind.SAMPLER), model_id=model(bare).model_id, tinker_path=f"tinker://{bare}/x/c"
    )
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(in_none,)))

    assert await store.usage.storage(TENANT) == [
        StorageRecord(TENANT, DEFAULT_PROJECT, 1, 10),
        StorageRecord(TENANT, "project", 2, 15),
    ]
    assert await store.usage.storage(TENANT, "project") == [StorageRecord(TENANT, "project", 2, 15)]
    assert await store.usage.storage(TENANT, "nothing") == []
    assert await store.usage.storage(OTHER_TENANT) == []


def test_hours_begin_on_the_hour() -> None:
    assert [hour_of(seconds) for seconds in (0.0, 3_599.9, 3_600.0)] == [0, 0, HOUR_S]
