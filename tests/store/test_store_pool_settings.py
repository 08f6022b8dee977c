"""Decisions about pools, and commands about runs: audited, versioned, followed by a watch, ended once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from store_builders import MODEL, POOL, SESSION, TENANT, model, session

from treadle.domain.commands import CommandKind, CommandOutcome
from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.limits import MAX_ADDED_POOLS, MAX_OPEN_COMMANDS
from treadle.domain.ops import OpKind
from treadle.domain.pool_decisions import PoolDecisions, PoolState
from treadle.domain.records import LeaseRecord, NewRequest
from treadle.errors import Fenced, InvalidRequest
from treadle.store import Store
from treadle.store.audit import AuditEvent, Author
from treadle.store.pool_watch import PoolWatch
from treadle.store.run_search import RunFilter
from treadle.testing.clock import ManualClock

AUTHOR = Author(TenantId("user:ops"), "user:ops (key 3)")
ADDED = PoolName("org/added")
SOURCE = "org/model"


async def events(store: Store) -> list[AuditEvent]:
    found = await store.audit.read(AUTHOR.tenant_id, since=0.0, before=1e12)
    assert found is not None
    return found


async def lease_of(store: Store, pool: PoolName = POOL) -> LeaseRecord:
    lease = await store.leases.acquire(pool, "leader", 1e6)
    assert lease is not None
    return lease


async def new_run(store: Store, model_id: ModelId = MODEL, *, pool: PoolName = POOL) -> None:
    await store.sessions.create(session(), None)
    record = replace(model(model_id), pool=pool)
    request = NewRequest(
        request_id=f"{model_id}:0",  # type: ignore[arg-type]
        tenant_id=TENANT,
        pool=pool,
        kind=OpKind.CREATE_MODEL,
        seq_id=0,
        num_tokens=0,
        payload=b"{}",
        model_id=model_id,
    )
    await store.models.create(record, request)


async def test_nothing_decided_is_version_0_and_serves(store: Store) -> None:
    assert await store.pool_settings.version() == 0
    assert await store.pool_settings.read() == PoolDecisions()
    assert PoolDecisions().state_of(POOL) is PoolState.SERVING


async def test_a_pool_is_paused_resumed_drained_and_removed_each_with_its_event(store: Store) -> None:
    for state in (PoolState.PAUSED, PoolState.SERVING, PoolState.DRAINING, PoolState.REMOVED):
        await store.pool_settings.decide(AUTHOR, POOL, state, "a reason")
        picture = await store.pool_settings.read()
        assert (picture.state_of(POOL), picture.pools[POOL].reason) == (state, "a reason")
    assert picture.version == 4
    written = await events(store)
    assert [event.event for event in written] == ["pool.paused", "pool.resumed", "pool.draining", "pool.removed"]
    assert {(event.subject, event.actor) for event in written} == {(f"pool:{POOL}", AUTHOR.actor)}
    assert written[0].details["before"] is None
    assert written[1].details["before"]["state"] == "paused"
    assert written[3].details["after"] == {
        "state": "removed",
        "source": None,
        "revision": None,
        "reason": "a reason",
        "num_workers": None,
        "num_samplers": None,
    }


async def test_the_same_decision_twice_is_one(store: Store) -> None:
    await store.pool_settings.decide(AUTHOR, POOL, PoolState.SERVING)
    assert await store.pool_settings.version() == 0, "it served already"
    for _ in range(2):
        await store.pool_settings.decide(AUTHOR, POOL, PoolState.PAUSED, "upkeep")
    for _ in range(2):
        await store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    for _ in range(2):
        await store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED)
    assert await store.pool_settings.version() == 3
    assert len(await events(store)) == 3


async def test_a_removed_pool_must_be_added_before_anything_else(store: Store) -> None:
    await store.pool_settings.add(AUTHOR, ADDED, SOURCE, "main")
    await store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED, "too large")
    for state in (PoolState.SERVING, PoolState.PAUSED, PoolState.DRAINING):
        with pytest.raises(InvalidRequest, match="was removed"):
            await store.pool_settings.decide(AUTHOR, ADDED, state)
    await store.pool_settings.add(AUTHOR, ADDED, None, None)
    decision = (await store.pool_settings.read()).pools[ADDED]
    assert (decision.state, decision.source, decision.revision) == (PoolState.SERVING, SOURCE, "main")
    assert decision.reason == ""


async def test_a_name_stands_for_one_source_while_its_runs_are_stored(store: Store) -> None:
    await store.pool_settings.add(AUTHOR, ADDED, "org/typo", None)
    with pytest.raises(InvalidRequest, match="served already, from org/typo"):
        await store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    await store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED)
    await store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)  # nothing depends on the typo
    await new_run(store, pool=ADDED)
    await store.pool_settings.decide(AUTHOR, ADDED, PoolState.REMOVED)
    with pytest.raises(InvalidRequest, match="runs of that are stored"):
        await store.pool_settings.add(AUTHOR, ADDED, "org/other", None)
    with pytest.raises(InvalidRequest, match="runs of that are stored"):
        await store.pool_settings.add(AUTHOR, ADDED, SOURCE, "another-revision")
    await store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    assert (await store.pool_settings.read()).pools[ADDED].source == SOURCE


async def test_so_many_pools_may_be_added(store: Store) -> None:
    for number in range(MAX_ADDED_POOLS):
        await store.pool_settings.add(AUTHOR, PoolName(f"m{number}"), SOURCE, None)
    with pytest.raises(InvalidRequest, match=str(MAX_ADDED_POOLS)):
        await store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)
    await store.pool_settings.decide(AUTHOR, PoolName("m0"), PoolState.REMOVED)
    await store.pool_settings.add(AUTHOR, ADDED, SOURCE, None)


async def test_a_watch_follows_and_calls_back(store: Store) -> None:
    watch = PoolWatch(store, every_s=0.01)
    changes: list[int] = []
    watch.on_change(lambda: changes.append(watch.now.version))
    await watch.start()
    try:
        assert watch.now.version == 0
        await store.pool_settings.decide(AUTHOR, POOL, PoolState.PAUSED)
        async with asyncio.timeout(10):
            while watch.now.state_of(POOL) is not PoolState.PAUSED:  # noqa: ASYNC110  # its task is waited for
                await asyncio.sleep(0.01)
    finally:
        await watch.stop()
    assert changes == [1]


async def test_a_command_is_open_until_a_leader_ends_it_once(store: Store, clock: ManualClock) -> None:
    await new_run(store)
    run = await store.models.get(MODEL)
    assert run is not None
    first = await store.commands.give(AUTHOR, CommandKind.EVICT, run)
    assert await store.commands.give(AUTHOR, CommandKind.EVICT, run) == first, "the same wish"
    other = await store.commands.give(AUTHOR, CommandKind.SNAPSHOT, run)
    assert [command.command_id for command in await store.commands.open_of(POOL)] == [first, other]
    assert await store.commands.open_of(ADDED) == []

    old = await lease_of(store)
    lease = await lease_of(store)
    with pytest.raises(Fenced):
        await store.commands.end(old, first, CommandOutcome(True, "too late"))
    await store.commands.end(lease, first, CommandOutcome(False, "why: because"))
    await store.commands.end(lease, first, CommandOutcome(True, "again"))
    command = await store.commands.get(first)
    assert command is not None
    assert (command.outcome, command.done_at) == (CommandOutcome(False, "why: because"), clock.now())
    assert [command.command_id for command in await store.commands.open_of(POOL)] == [other]
    assert await store.commands.give(AUTHOR, CommandKind.EVICT, run) > other, "an id never comes back"
    assert [event.event for event in await events(store)] == ["run.evict", "run.snapshot", "run.evict"]
    assert {event.subject for event in await events(store)} == {f"run:{MODEL}"}


async def test_commands_are_bounded_and_forgotten(store: Store, clock: ManualClock) -> None:
    await new_run(store)
    run = await store.models.get(MODEL)
    assert run is not None
    lease = await lease_of(store)
    for _ in range(3):
        command_id = await store.commands.give(AUTHOR, CommandKind.SNAPSHOT, run)
        await store.commands.end(lease, command_id, CommandOutcome(True, ""))
    assert await store.commands.forget(created_before=clock.now()) == 0
    assert await store.commands.forget(created_before=clock.now() + 1) == 3
    assert await store.commands.get(command_id) is None
    assert MAX_OPEN_COMMANDS > 2


async def test_runs_are_paged_newest_first_whoever_owns_them(store: Store) -> None:
    await store.sessions.create(session(), None)
    ids = [ModelId(f"{SESSION}:train:{number}") for number in range(5)]
    for number, model_id in enumerate(ids):
        # Two of them in the same moment.
        record = model(model_id, created_at=float(max(number, 1)), tenant=TenantId(f"user:{number % 2}"))
        request = NewRequest(
            request_id=f"{model_id}:0",  # type: ignore[arg-type]
            tenant_id=record.tenant_id,
            pool=POOL,
            kind=OpKind.CREATE_MODEL,
            seq_id=0,
            num_tokens=7,
            payload=b"{}",
            model_id=model_id,
        )
        await store.models.create(record, request)
    seen: list[ModelId] = []
    after = None
    while page := await store.run_search.page(RunFilter(), limit=2, after=after):
        seen += [run.model_id for run in page]
        after = (page[-1].created_at, page[-1].model_id)
    assert seen == ids[::-1]
    odd = await store.run_search.page(RunFilter(tenant_id=TenantId("user:1")), limit=10)
    assert [run.model_id for run in odd] == [ids[3], ids[1]]
    assert await store.run_search.page(RunFilter(pool=ADDED), limit=10) == []
    work = await store.run_search.work(odd[0], snapshot_seq_id=-1)
    assert (work.waiting.num_ops, work.waiting.num_tokens, work.num_replayed) == (1, 7, 0)
    assert work.oldest_at is not None
