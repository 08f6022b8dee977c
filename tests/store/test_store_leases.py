"""Leases: who gets one, how it is kept, and that a leader that lost it can write nothing. Real threads, real rows."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from store_builders import POOL, done, op, with_run

from treadle.domain.outcome import PoolFacts
from treadle.domain.records import FinishedCycle
from treadle.errors import Fenced
from treadle.store import Store
from treadle.store.leases import RENEWALS_PER_TTL
from treadle.store.tables import leases
from treadle.testing.clock import ManualClock

TTL_S = 0.3
PATIENCE_S = 20.0


async def seconds_left(store: Store) -> float:
    report = await store.pools.report(POOL)
    return report.expires_in_s


async def test_a_holder_known_to_be_dead_is_replaced_at_once(store: Store) -> None:
    first = await store.leases.acquire(POOL, "dead", ttl_s=10.0)
    assert first is not None
    assert await store.leases.acquire(POOL, "next", ttl_s=10.0, instead_of="somebody else") is None
    taken = await store.leases.acquire(POOL, "next", ttl_s=10.0, instead_of="dead")
    assert taken is not None
    assert taken.token == first.token + 1
    # Two standbys saw the same death: only one of them leads.
    assert await store.leases.acquire(POOL, "late", ttl_s=10.0, instead_of="dead") is None


async def test_two_servers_that_ask_at_once_do_not_both_lead(database_url: str) -> None:
    stores = [await Store.open(database_url) for _ in range(4)]
    try:
        for store in stores:
            await store.leases.current(POOL)
        asked = [store.leases.acquire(POOL, f"server {index}", ttl_s=60.0) for index, store in enumerate(stores)]
        given = [lease for lease in await asyncio.gather(*asked) if lease is not None]
        assert len(given) == 1
    finally:
        for store in stores:
            await store.close()


async def test_a_lease_is_kept_while_the_event_loop_stands_still(database_url: str) -> None:
    """The thread renews on its own connection: a loop that is blocked for longer than the lease lasts costs nothing."""
    store = await Store.open(database_url)
    lease = await store.leases.acquire(POOL, "leader", TTL_S)
    assert lease is not None
    renewal = store.leases.keep(lease, TTL_S)
    # Blocks the loop; the thread below is not one of the loop's.
    await _until_renewed(store, lease.expires_at)
    stopped = asyncio.get_running_loop().time() + 2 * TTL_S
    while asyncio.get_running_loop().time() < stopped:
        pass
    other = await store.leases.acquire(POOL, "other", TTL_S)
    assert other is None, "the lease was not renewed while the loop stood still"
    await renewal.stop()
    await store.close()


async def _until_renewed(store: Store, expires_at: float) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (current := await store.leases.current(POOL)) is None or current.expires_at <= expires_at:  # noqa: ASYNC110 (only the row tells)
            await asyncio.sleep(TTL_S / 10)


async def test_a_lease_is_kept_while_the_writer_is_busy(database_url: str) -> None:
    """On PostgreSQL a long transaction of the writer holds no lock that the renewal needs; SQLite has one writer."""
    store = await Store.open(database_url)
    if store._database.dialect.is_sqlite:
        await store.close()
        pytest.skip("one write lock for everybody; the lease of its one server is nobody's concern")
    lease = await store.leases.acquire(POOL, "leader", TTL_S)
    assert lease is not None
    renewal = store.leases.keep(lease, TTL_S)
    writing = asyncio.create_task(
        store._writer.run(lambda conn: conn.execute(sa.select(sa.func.pg_sleep(3 * TTL_S))).scalar())
    )
    await asyncio.sleep(2 * TTL_S)
    assert not writing.done()
    assert await store.leases.current(POOL) is not None
    await writing
    await renewal.stop()
    await store.close()


async def test_a_taken_lease_is_noticed_and_its_writes_are_refused(store: Store) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    lease = await store.leases.acquire(POOL, "leader", ttl_s=10.0)
    assert lease is not None
    renewal = store.leases.keep(lease, TTL_S)
    assert await store.leases.acquire(POOL, "thief", ttl_s=10.0, instead_of="leader") is not None
    async with asyncio.timeout(PATIENCE_S):
        await renewal.lost()
    await renewal.stop()
    with pytest.raises(Fenced):
        await store.cycles.finish(lease, FinishedCycle(finished=(done(op(1)),)))
    with pytest.raises(Fenced):
        await store.cycles.begin(lease, 2, [op(1).request_id])
    with pytest.raises(Fenced):
        await store.pools.publish(lease, facts=None, is_ready=True, reason="")
    queued = await store.requests.future(op(1).request_id)
    assert queued is not None
    assert queued.state == "queued"


async def test_the_databases_clock_counts_where_it_has_one(postgres_url: str) -> None:
    """A server whose clock is a day ahead takes no lease that is alive."""
    leader, ahead = await Store.open(postgres_url), await Store.open(postgres_url)
    assert await leader.leases.acquire(POOL, "leader", ttl_s=60.0) is not None
    assert "now" not in ahead.leases._statements.clock_values()
    assert 0 < await seconds_left(ahead) <= 60.0
    assert await ahead.leases.acquire(POOL, "ahead", ttl_s=60.0) is None
    await leader._database.write(lambda conn: conn.execute(leases.update().values(expires_at=1.0)).rowcount)
    assert await ahead.leases.acquire(POOL, "ahead", ttl_s=60.0) is not None
    await leader.close()
    await ahead.close()


async def test_a_renewal_that_waited_for_a_lock_counts_from_when_it_got_it(postgres_url: str) -> None:
    """Else a lease renewed behind a long commit of its own leader would be over when it is renewed."""
    store = await Store.open(postgres_url)
    ttl_s = 0.6
    lease = await store.leases.acquire(POOL, "leader", ttl_s)
    assert lease is not None

    def long_commit(conn: sa.Connection) -> None:
        conn.execute(leases.update().values(cycle=7))
        conn.execute(sa.select(sa.func.pg_sleep(2 * ttl_s))).scalar()

    writing = asyncio.create_task(store._writer.run(long_commit))
    renewal = store.leases.keep(lease, ttl_s)
    await writing
    async with asyncio.timeout(PATIENCE_S):
        while (left_s := await seconds_left(store)) <= 0:  # noqa: ASYNC110 (only the row tells)
            await asyncio.sleep(0.01)
    assert left_s > ttl_s * (1 - 1 / RENEWALS_PER_TTL) - 0.1
    await renewal.stop()
    await store.close()


async def test_what_a_leader_reports_is_read_by_all_and_dies_with_its_lease(
    store: Store, clock: ManualClock, database_url: str
) -> None:
    facts = PoolFacts(
        base_model=POOL,
        revision="abc",
        architecture="qwen3",
        vocab_size=1000,
        max_context_length=4096,
        num_parameters=1,
        dtype="float32",
        device="cpu",
        numerics_profile="strict",
        trainable_targets=("mlp", "attn"),
        extra={"why": "test"},
    )
    assert not (await store.pools.report(POOL)).is_ready
    lease = await store.leases.acquire(POOL, "leader", ttl_s=10.0)
    assert lease is not None
    starting = await store.pools.report(POOL)
    assert (starting.holder, starting.is_ready, starting.facts) == ("leader", False, None)
    await store.pools.publish(lease, facts=facts, is_ready=True, reason="")
    other = await Store.open(database_url, clock=clock.now)
    report = await other.pools.report(POOL)
    assert report.facts == facts
    assert report.is_ready
    taken_over = await store.leases.acquire(POOL, "next", ttl_s=10.0, instead_of="leader")
    assert taken_over is not None
    silent = await other.pools.report(POOL)
    assert (silent.holder, silent.is_ready, silent.facts) == ("next", False, facts), "those are the words of another"
    clock.advance(11.0)
    after = await other.pools.report(POOL)
    await other.close()
    assert after.facts == facts, "what the model is like does not change with its leader"
    assert (after.holder, after.is_ready) == ("", False)
    assert "no server" in after.reason
