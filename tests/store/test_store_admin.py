"""Operators' reads and decisions, on both databases: pages without gaps, sums that agree, changes with their trace."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from store_builders import MODEL, OTHER_TENANT, TENANT, checkpoint, lead, session, with_run

from treadle.domain.fairness import WeightClass
from treadle.domain.ids import ModelId, TenantId, TinkerPath
from treadle.domain.records import FinishedCycle, LeaseRecord
from treadle.domain.tenants import TenantChange
from treadle.domain.usage import HOUR_S, UsageKind
from treadle.errors import Fenced, InvalidRequest
from treadle.store import Store
from treadle.store.admin_audit import AuditQuery
from treadle.store.admin_usage import GroupBy, SumQuery
from treadle.store.audit import Author
from treadle.store.slots import Slots
from treadle.store.tables import usage_events
from treadle.store.tenant_listing import TenantQuery
from treadle.testing.clock import ManualClock

OPS = Author(TenantId("user:ops"), "user:ops (key 1)")
GROUPINGS: tuple[GroupBy, ...] = ("tenant", "run", "session", "project", "day", "hour")


async def all_pages(
    read: Callable[[Any], Awaitable[Sequence[Any]]], place: Callable[[Any], Any], limit: int
) -> list[Any]:
    """Every row of a listing, page by page; `read` takes the place of the last row, None at first."""
    found: list[Any] = []
    last: Any = None
    while True:
        page = await read(last)
        assert len(page) <= limit
        found += page
        if len(page) < limit:
            return found
        last = place(page[-1])


async def test_tenants_with_rows_and_with_sessions_alone_are_each_listed_once(store: Store) -> None:
    # Two orders of texts differ in these.
    names = ["user:Zoe", "user:adam", "user:Ben", "open:0a", "open:0B", "ms:é"]
    for number, name in enumerate(names):
        if number % 3 != 1:
            await store.tenants.change(TenantId(name), TenantChange(weight_class=WeightClass.BULK), author=OPS)
        if number % 3 != 0:
            for count in range(4):
                await store.sessions.create(session(f"s{number}-{count}", tenant=TenantId(name)))

    for limit in (1, 2, 3, 100):
        listed = await all_pages(
            lambda after, limit=limit: store.tenant_listing.find(TenantQuery(limit=limit, after=after or "")),
            lambda record: record.tenant_id,
            limit,
        )
        assert sorted(record.tenant_id for record in listed) == sorted(names)
    found = await store.tenant_listing.find(TenantQuery(limit=1, text="%"))
    assert found == [], "a text is no pattern"
    assert [r.tenant_id for r in await store.tenant_listing.find(TenantQuery(limit=9, text="ser:a"))] == ["user:adam"]


async def test_a_change_makes_a_newer_picture_and_one_event(store: Store) -> None:
    await store.organizations.put("acme", "d", author=OPS)
    version = await store.policies.version()
    change = TenantChange(organization="acme", is_suspended=True, suspended_reason="unpaid")

    for _ in range(2):
        record = await store.tenants.change(TENANT, change, author=OPS)

    assert (record.organization, record.is_suspended, record.source) == ("acme", True, "admin")
    picture = await store.policies.read()
    assert picture.version == version + 1
    assert (picture.organizations, picture.suspended) == ({TENANT: "acme"}, {TENANT: "unpaid"})
    [numbered] = await store.admin_audit.find(AuditQuery(limit=9, subject=f"tenant:{TENANT}"))
    assert (numbered.event.actor, numbered.event.details["before"]) == (OPS.actor, None)
    with pytest.raises(InvalidRequest, match="does not exist"):
        await store.tenants.change(TENANT, TenantChange(organization="other"), author=OPS)
    assert await store.policies.version() == version + 1


async def test_an_organization_in_use_stays(store: Store) -> None:
    for text in ("one", "two", "two"):
        await store.organizations.put("acme", text, author=OPS)
    await store.tenants.change(TENANT, TenantChange(organization="acme"), author=OPS)
    [record] = await store.organizations.list(10)
    assert (record.name, record.description, record.num_tenants) == ("acme", "two", 1)
    with pytest.raises(InvalidRequest, match="1 tenants"):
        await store.organizations.delete("acme", author=OPS)
    await store.tenants.change(TENANT, TenantChange(organization=""), author=OPS)
    assert await store.organizations.delete("acme", author=OPS)
    assert await store.organizations.list(10) == []
    assert not await store.organizations.delete("acme", author=OPS)
    assert len(await store.admin_audit.find(AuditQuery(limit=9, subject="organization:acme"))) == 3


async def test_an_organization_is_never_joined_while_it_is_deleted(store: Store) -> None:
    for _ in range(10):
        await store.organizations.put("acme", "", author=OPS)
        change = TenantChange(organization="acme")
        joined, deleted = await asyncio.gather(
            store.tenants.change(TENANT, change, author=OPS),
            store.organizations.delete("acme", author=OPS),
            return_exceptions=True,
        )
        assert isinstance(joined, InvalidRequest) != isinstance(deleted, InvalidRequest), (joined, deleted)
        await store.tenants.change(TENANT, TenantChange(organization=""), author=OPS)


async def use(store: Store, rows: list[dict[str, Any]]) -> None:
    """Rows of usage, as the counters leave them."""
    await store._writer.run(lambda conn: conn.execute(sa.insert(usage_events), rows).close())


async def test_pages_of_all_groupings_have_every_amount_once(store: Store) -> None:
    drawn = random.Random(7)
    for tenant in ("a", "b", "c"):
        for number in range(2):
            found = session(f"{tenant}{number}", tenant=TenantId(tenant))
            await store.sessions.create(replace(found, project_id="p" if number else None))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _ in range(300):
        tenant, number = drawn.choice("abc"), drawn.randrange(2)
        row = {
            "tenant_id": tenant,
            "bucket_start": drawn.randrange(24 * 9) * HOUR_S,
            "session_id": f"{tenant}{number}",
            "model_id": drawn.choice(("", f"{tenant}{number}:train:0")),
            "base_model": drawn.choice(("x", "y")),
            "kind": drawn.choice(list(UsageKind)).value,
            "amount": float(drawn.randrange(1_000)),
        }
        rows[tuple(value for name, value in row.items() if name != "amount")] = row
    await use(store, list(rows.values()))
    since, before = 20 * HOUR_S, 200 * HOUR_S
    wanted = dict.fromkeys(UsageKind, 0.0)
    for row in rows.values():
        if since <= row["bucket_start"] < before:
            wanted[UsageKind(row["kind"])] += row["amount"]

    for group_by in GROUPINGS:
        for limit in (1, 3, 1_000):
            query = SumQuery(group_by, since, before, limit)
            groups = await all_pages(
                lambda behind, query=query: store.admin_usage.sums(replace(query, behind=behind)),
                lambda group: group.key,
                limit,
            )
            assert len({group.key for group in groups}) == len(groups)
            assert [group.key for group in groups] == sorted(group.key for group in groups)
            assert {kind: sum(group.amounts[kind] for group in groups) for kind in UsageKind} == wanted, group_by
    of_b = await store.admin_usage.sums(SumQuery("tenant", since, before, 9, tenant_id=TenantId("b")))
    assert [group.key for group in of_b] == [("b",)]
    events = await store.admin_usage.events(since=since, before=before)
    assert events is not None
    assert sum(event.amount for event in events) == sum(wanted.values())


async def with_checkpoints(store: Store, clock: ManualClock) -> LeaseRecord:
    await with_run(store)
    lease = await lead(store)
    made = [replace(checkpoint(f"c{number}"), created_at=clock.now() + number // 2) for number in range(5)]
    made.append(replace(checkpoint("of-other"), tenant_id=OTHER_TENANT, public=True, created_at=clock.now()))
    await store.cycles.finish(lease, FinishedCycle(checkpoints=tuple(made)))
    return lease


async def test_checkpoints_of_all_tenants_are_paged_by_age(store: Store, clock: ManualClock) -> None:
    await with_checkpoints(store, clock)
    for limit in (1, 2, 9):
        listed = await all_pages(
            lambda behind, limit=limit: store.admin_checkpoints.list(limit, behind=behind),
            lambda record: (record.created_at, record.tinker_path),
            limit,
        )
        times = [record.created_at for record in listed]
        assert len({record.tinker_path for record in listed}) == 6
        assert times == sorted(times, reverse=True)
    [public] = await store.admin_checkpoints.list(9, is_public=True)
    assert public.tenant_id == OTHER_TENANT
    assert len(await store.admin_checkpoints.list(9, tenant_id=TENANT)) == 5


async def test_what_an_operator_deletes_is_audited_and_its_storage_is_counted(store: Store, clock: ManualClock) -> None:
    await with_checkpoints(store, clock)
    [public] = await store.admin_checkpoints.list(9, is_public=True)
    path = TinkerPath(ModelId(MODEL), public.kind, public.name)
    assert str(path) == public.tinker_path

    for expected in (True, True):
        assert await store.admin_checkpoints.unpublish(path, author=OPS) is expected
    hour = int(clock.now() // HOUR_S) * HOUR_S
    clock.advance(60)
    for expected in (True, False):
        assert await store.admin_checkpoints.delete(path, author=OPS) is expected

    events = await store.admin_audit.find(AuditQuery(limit=9, actor=OPS.actor))
    assert [numbered.event.event for numbered in events] == ["checkpoint.deleted", "checkpoint.unpublished"]
    clock.advance(2 * HOUR_S)
    await store.usage.accrue_storage(hour)
    stored = await store.admin_usage.sums(SumQuery("tenant", 0, 2**40, 9, tenant_id=OTHER_TENANT))
    assert [group.amounts[UsageKind.STORAGE] for group in stored] == [public.size_bytes * 60.0]


async def test_slots_are_the_leaders_word_alone(store: Store) -> None:
    await with_run(store)
    old = await lead(store, "old")
    await store.slots.publish(old, Slots([ModelId(MODEL)], {TENANT: 2}))
    report = await store.slots.report(old)
    assert (list(report.slots.model_ids), report.slots.num_samples) == ([MODEL], {TENANT: 2})
    await store.leases.release(old)
    new = await lead(store, "new")
    assert (await store.slots.report(new)).reported_at is None
    with pytest.raises(Fenced):
        await store.slots.publish(old, Slots())
    assert [record.model_id for record in await store.models.of_ids([ModelId(MODEL), ModelId("no")])] == [MODEL]


async def test_hours_are_remembered_only_once_nothing_adds_to_them(store: Store, clock: ManualClock) -> None:
    """By day and hour over all tenants; each reading must be what the rows say then."""
    begin = int(clock.now() // HOUR_S + 1) * HOUR_S
    clock.advance(begin + 10 - clock.now())

    async def hourly() -> dict[tuple[int, UsageKind], float]:
        groups = await store.admin_usage.sums(SumQuery("hour", begin - HOUR_S, begin + 48 * HOUR_S, 100))
        return {
            (int(group.key[0]) - begin, kind): amount
            for group in groups
            for kind, amount in group.amounts.items()
            if amount
        }

    async def train(hour: int, tokens: float, model_id: str) -> None:
        row = {"tenant_id": "a", "session_id": "s", "base_model": "m", "kind": UsageKind.TRAINING.value}
        await use(store, [{**row, "bucket_start": begin + hour * HOUR_S, "model_id": model_id, "amount": tokens}])

    assert await hourly() == {}
    await train(0, 5, "1")
    assert await hourly() == {(0, UsageKind.TRAINING): 5}
    await train(0, 7, "2")
    assert await hourly() == {(0, UsageKind.TRAINING): 12}
    # The hour is over, and a commit that began in it comes late.
    clock.advance(HOUR_S)
    assert await hourly() == {(0, UsageKind.TRAINING): 12}
    await train(0, 1, "3")
    assert await hourly() == {(0, UsageKind.TRAINING): 13}
    # Its storage is written when the sweep comes to it, however late that is.
    await with_run(store)
    lease = await lead(store)
    late = replace(checkpoint("one"), created_at=float(begin))
    await store.cycles.finish(lease, FinishedCycle(checkpoints=(late,)))
    clock.advance(5 * HOUR_S)
    assert await hourly() == {(0, UsageKind.TRAINING): 13}
    await store.usage.accrue_storage(begin)
    stored = late.size_bytes * HOUR_S
    assert await hourly() == {(0, UsageKind.TRAINING): 13, (0, UsageKind.STORAGE): stored}
    # Now it is settled: what is written into it by hand is not looked for.
    await train(0, 100, "4")
    await train(1, 3, "1")
    assert await hourly() == {
        (0, UsageKind.TRAINING): 13,
        (0, UsageKind.STORAGE): stored,
        (HOUR_S, UsageKind.TRAINING): 3,
    }
    days = await store.admin_usage.sums(SumQuery("day", begin, begin + 2 * HOUR_S, 9))
    assert sum(day.amounts[UsageKind.TRAINING] for day in days) == 16
