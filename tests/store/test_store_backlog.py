"""What waits, added up, and where one request stands; tenants' classes. On every database."""

from __future__ import annotations

from store_builders import (
    MODEL,
    OTHER_TENANT,
    POOL,
    REFUSED,
    SAMPLER,
    TENANT,
    creation,
    done,
    lead,
    op,
    sample,
    sampling_session,
    with_run,
)

from treadle.domain.backlog import Load, Place
from treadle.domain.fairness import WeightClass
from treadle.domain.ids import RequestId
from treadle.domain.records import FinishedCycle, ModelAdvance
from treadle.store import Store


async def created(store: Store) -> None:
    """A run that is created, and waits for its first op."""
    await with_run(store)
    finished = FinishedCycle(finished=(done(creation()),), advances=(ModelAdvance(MODEL, 1),))
    await store.cycles.finish(await lead(store), finished)


async def place(store: Store, request_id: str) -> Place:
    row = await store.requests.get(RequestId(request_id))
    assert row is not None
    return await store.backlog.place_of(row)


async def test_queued_work_is_summed_by_tenant_pool_and_kind(store: Store) -> None:
    await created(store)
    await store.sampling.create(sampling_session())
    await store.requests.enqueue(op(1, num_tokens=10, payload=b"four"))
    await store.requests.enqueue(op(2, num_tokens=5, payload=b"", payload_key="payloads/1"))
    await store.requests.enqueue(op(3, failure=REFUSED))
    await store.requests.enqueue(op(4, num_tokens=7, payload=b"x", tenant=OTHER_TENANT))
    await store.requests.enqueue(sample(1))

    entries = {(entry.tenant_id, entry.is_sample): entry for entry in await store.backlog.read()}

    assert set(entries) == {(TENANT, False), (TENANT, True), (OTHER_TENANT, False)}
    assert (entries[TENANT, False].load.num_ops, entries[TENANT, False].load.num_tokens) == (2, 15)
    assert entries[TENANT, False].load.num_bytes >= 4
    assert entries[OTHER_TENANT, False].load == Load(1, 7, 1)
    assert {entry.pool for entry in entries.values()} == {POOL}
    assert entries[TENANT, True].load.num_ops == 1
    assert all(entry.oldest_at > 0 for entry in entries.values())


async def test_an_ops_place_is_told_from_its_own_line(store: Store) -> None:
    await created(store)
    for seq_id in (1, 2, 3, 6):
        await store.requests.enqueue(op(seq_id, num_tokens=10, payload=b"12"))

    assert await place(store, f"{MODEL}:1") == Place(Load())
    assert await place(store, f"{MODEL}:3") == Place(Load(2, 20, 4))
    assert await place(store, f"{MODEL}:6") == Place(Load(3, 30, 6), missing_seq_id=4)
    assert await store.backlog.first_missing(MODEL, before=3) is None
    assert await store.backlog.first_missing(MODEL, before=5) == 4


async def test_a_samples_place_is_told_from_its_tenants_samples(store: Store) -> None:
    await created(store)
    await store.sampling.create(sampling_session())
    for seq_id in (9, 4):
        await store.requests.enqueue(sample(seq_id))

    assert (await place(store, f"{SAMPLER}:9")).ahead.num_ops == 0
    assert (await place(store, f"{SAMPLER}:4")).ahead.num_ops == 1


async def test_classes_are_kept_for_those_who_have_one(store: Store) -> None:
    await store.tenants.set_class(TENANT, WeightClass.BULK)
    await store.tenants.set_class(OTHER_TENANT, WeightClass.BULK)
    await store.tenants.set_class(TENANT, WeightClass.INTERACTIVE)
    await store.tenants.set_class(OTHER_TENANT, WeightClass.STANDARD)
    assert await store.tenants.classes() == {TENANT: WeightClass.INTERACTIVE}
