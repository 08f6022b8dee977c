"""Hints between servers on one PostgreSQL: they arrive, quickly, and nothing is lost but time when one does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from store_builders import POOL, done, lead, op, with_run

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle
from treadle.domain.states import RequestState
from treadle.store import Store
from treadle.store.notify import _MAX_PAYLOAD_BYTES, CHANNEL, payloads
from treadle.testing.postgres import ThrowAwayPostgres

pytestmark = pytest.mark.postgres

PATIENCE_S = 20.0
RESULT = done(op(1)).result


@dataclass(frozen=True, slots=True)
class TwoServers:
    here: Store
    there: Store


@pytest.fixture
async def two(postgres_url: str) -> AsyncIterator[TwoServers]:
    servers = TwoServers(await Store.open(postgres_url), await Store.open(postgres_url))
    await with_run(servers.here)
    for store in (servers.here, servers.there):
        await _listens(store)
    yield servers
    await servers.here.close()
    await servers.there.close()


async def _listens(store: Store) -> None:
    """Return once hints of another connection reach this store."""
    heard = asyncio.Event()
    unsubscribe = store.events.on_pool_changed(lambda _pool: heard.set())
    async with asyncio.timeout(PATIENCE_S):
        while not heard.is_set():
            await store._database.write(
                lambda conn: conn.exec_driver_sql(f"""NOTIFY {CHANNEL}, '{{"pools": ["probe"]}}'""").rowcount
            )
            await asyncio.sleep(0.02)
    unsubscribe()


class Heard:
    """What a store's listeners were told, and a way to wait for it."""

    def __init__(self, store: Store) -> None:
        self.enqueued: list[tuple[PoolName, OpKind]] = []
        self.finished: list[RequestId] = []
        self._changed = asyncio.Event()
        store.events.on_enqueued(lambda pool, kind: self._note(self.enqueued, (pool, kind)))
        store.events.on_finished(lambda ids: [self._note(self.finished, id_) for id_ in ids])

    def _note(self, heard: list, item: object) -> None:  # type: ignore[type-arg]
        heard.append(item)
        self._changed.set()

    async def until(self, heard: list, count: int) -> None:  # type: ignore[type-arg]
        async with asyncio.timeout(PATIENCE_S):
            while len(heard) < count:
                self._changed.clear()
                await self._changed.wait()


async def test_rows_wake_the_leader_in_another_process_and_results_the_waiters(two: TwoServers) -> None:
    there, here = Heard(two.there), Heard(two.here)
    await two.here.requests.enqueue(op(1))
    await there.until(there.enqueued, 1)
    assert there.enqueued == [(POOL, OpKind.FORWARD_BACKWARD)]
    await two.there.cycles.finish(await lead(two.there), FinishedCycle(finished=(done(op(1)),)))
    await here.until(here.finished, 1)
    assert here.finished == [op(1).request_id]
    # What this process knew of it is older, and not believed any more.
    future = await two.here.requests.future(op(1).request_id)
    assert future is not None
    assert future.state is RequestState.DONE
    assert future.result == RESULT


async def test_own_hints_do_not_come_back(two: TwoServers) -> None:
    here, there = Heard(two.here), Heard(two.there)
    for seq_id in range(1, 4):
        await two.here.requests.enqueue(op(seq_id))
        await there.until(there.enqueued, seq_id)
    # Behind these it would have come: notifications keep their order.
    await two.there.requests.enqueue(op(4))
    await here.until(here.enqueued, 4)
    assert len(here.enqueued) == 4


async def test_hints_come_again_after_the_connection_broke(two: TwoServers, postgres: ThrowAwayPostgres) -> None:
    here = Heard(two.here)
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'")
    await _listens(two.here)
    await _listens(two.there)
    await two.there.requests.enqueue(op(1))
    await here.until(here.enqueued, 1)


async def test_a_lost_hint_costs_the_slow_poll_only(two: TwoServers) -> None:
    here = Heard(two.here)
    await two.here.requests.enqueue(op(1))
    two.there.events.forward_to(_Silence())
    await two.there.cycles.finish(await lead(two.there), FinishedCycle(finished=(done(op(1)),)))
    old = await two.here.requests.future(op(1).request_id)
    assert old is not None
    assert old.state is RequestState.QUEUED
    assert await two.here.requests.futures_state([op(1).request_id]) == {op(1).request_id: RequestState.DONE}
    new = await two.here.requests.future(op(1).request_id)
    assert new is not None
    assert new.result == RESULT
    assert here.finished == []


async def test_foreign_notifications_on_the_channel_are_ignored(two: TwoServers) -> None:
    here = Heard(two.here)
    for payload in ("", "{", "[1]", '"x"', '{"queued": [["p", "a kind of tomorrow"]]}'):
        await two.there._database.write(
            lambda conn, payload=payload: conn.exec_driver_sql(f"NOTIFY {CHANNEL}, '{payload}'").rowcount
        )
    await two.there.requests.enqueue(op(1))
    await here.until(here.enqueued, 1)
    assert here.enqueued == [(POOL, OpKind.FORWARD_BACKWARD)]


def test_payloads_fit_and_hold_everything_in_order() -> None:
    finished = [RequestId(f"{number:032x}:train:0:{number}") for number in range(1_000)]
    queued = [(PoolName(f"pool {number} \u00e9\u4e2d"), OpKind.OPTIM_STEP) for number in range(300)]
    sent = list(payloads(queued, finished, [PoolName("p")]))
    assert all(len(payload.encode()) <= _MAX_PAYLOAD_BYTES for payload in sent)
    assert len(sent) < 20
    hints = [json.loads(payload) for payload in sent]
    assert [id_ for hint in hints for id_ in hint.get("finished", [])] == finished
    assert [tuple(pair) for hint in hints for pair in hint.get("queued", [])] == queued
    assert [pool for hint in hints for pool in hint.get("pools", [])] == ["p"]
    assert list(payloads([], [], [])) == []


class _Silence:
    """Forwards nothing: every notification is lost."""

    def enqueued(self, pool: PoolName, kind: OpKind) -> None: ...

    def finished(self, request_ids: object) -> None: ...

    def pool_changed(self, pool: PoolName) -> None: ...
