"""Group commit: one flush for many, isolation of a failing write, and what a caller may rely on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from store_builders import MODEL, enqueue_all, lead, op, session, with_run

from treadle.domain.ids import RequestId
from treadle.domain.records import FinishedCycle, ModelAdvance
from treadle.errors import ConfigError, Fenced, ServerError, StoreUnavailable
from treadle.store import Store
from treadle.store.engine import Database
from treadle.store.writer import Writer
from treadle.testing.clock import ManualClock

_TABLE = sa.Table(
    "t", sa.MetaData(), sa.Column("n", sa.Integer, primary_key=True), sa.Column("x", sa.Integer, unique=True)
)


class Bench:
    """A writer on a table of its own, and a count of the transactions it committed."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self.database = database
        self.writer = writer
        self.num_commits = 0
        sa.event.listen(database.writing, "commit", self._count)

    def _count(self, _conn: sa.Connection) -> None:
        self.num_commits += 1

    async def add(self, value: int) -> int:
        def write(conn: sa.Connection) -> int:
            conn.execute(_TABLE.insert(), {"x": value})
            return value

        return await self.writer.run(write)

    async def values(self) -> list[int]:
        query = sa.select(_TABLE.c.x).order_by(_TABLE.c.n)
        return await self.database.read(lambda conn: list(conn.execute(query).scalars()))


@pytest.fixture
async def bench(database_url: str) -> AsyncIterator[Bench]:
    database = Database.of(database_url)
    await database.write(_TABLE.create)
    writer = Writer(database)
    yield Bench(database, writer)
    await writer.close()
    await database.write(_TABLE.drop)
    await database.close()


async def test_waiting_writes_share_one_commit(bench: Bench) -> None:
    bench.num_commits = 0
    assert await asyncio.gather(*(bench.add(n) for n in range(50))) == list(range(50))
    assert bench.num_commits == 1
    assert await bench.values() == list(range(50))


async def test_a_group_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.store.writer.MAX_WRITES_PER_COMMIT", 20)
    bench.num_commits = 0
    await asyncio.gather(*(bench.add(n) for n in range(50)))
    assert bench.num_commits == 3


async def test_only_the_guilty_caller_sees_its_error(bench: Bench) -> None:
    """The write fails after it wrote: its own part is rolled back, the neighbours' parts are not."""

    def fail(conn: sa.Connection) -> int:
        conn.execute(_TABLE.insert(), {"x": 99})
        raise Fenced("mine")

    outcomes = await asyncio.gather(bench.add(1), bench.writer.run(fail), bench.add(2), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, Fenced, int]
    assert await bench.values() == [1, 2]


async def test_a_database_error_is_isolated_and_translated(bench: Bench) -> None:
    outcomes = await asyncio.gather(bench.add(1), bench.add(1), bench.add(2), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, ServerError, int]
    assert await bench.values() == [1, 2]


async def test_neighbours_of_a_kind_are_written_in_one_call(bench: Bench) -> None:
    calls: list[list[int]] = []

    def double_all(_conn: sa.Connection, items: Sequence[int]) -> list[int]:
        calls.append(list(items))
        return [2 * item for item in items]

    answers = await asyncio.gather(
        bench.writer.run_batched(double_all, 1),
        bench.writer.run_batched(double_all, 2),
        bench.add(5),
        bench.writer.run_batched(double_all, 3),
    )
    assert answers == [2, 4, 5, 6]
    assert calls == [[1, 2], [3]]


async def test_guilty_item_of_a_batched_write_is_found(bench: Bench) -> None:
    def refuse_two(_conn: sa.Connection, items: Sequence[int]) -> Sequence[int]:
        if 2 in items:
            raise Fenced("two")
        return items

    writes = [bench.writer.run_batched(refuse_two, n) for n in (1, 2, 3)]
    assert [str(outcome) for outcome in await asyncio.gather(*writes, return_exceptions=True)] == ["1", "two", "3"]


async def test_cancelled_caller_leaves_its_write_and_its_event(bench: Bench) -> None:
    committed: list[int] = []
    waiting = asyncio.ensure_future(bench.writer.run(lambda _conn: 7, after_commit=committed.append))
    await asyncio.sleep(0)
    waiting.cancel()
    await bench.add(1)
    assert committed == [7]
    assert waiting.cancelled()


async def test_no_event_for_a_write_that_failed(bench: Bench) -> None:
    committed: list[int] = []

    def fail(_conn: sa.Connection) -> int:
        raise Fenced("mine")

    with pytest.raises(Fenced):
        await bench.writer.run(fail, after_commit=committed.append)
    assert committed == []


async def test_listener_that_raises_is_reported_and_harms_nobody(bench: Bench) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context.get("exception")))
    broken = ValueError("a listener's bug")

    def fail(_value: int) -> None:
        raise broken

    assert await bench.writer.run(lambda _conn: 1, after_commit=fail) == 1
    assert await bench.add(2) == 2
    assert reported == [broken]


async def test_close_commits_what_waits_and_refuses_the_rest(bench: Bench) -> None:
    waiting = [asyncio.ensure_future(bench.add(n)) for n in range(3)]
    await asyncio.sleep(0)
    await bench.writer.close()
    assert await asyncio.gather(*waiting) == [0, 1, 2]
    with pytest.raises(StoreUnavailable, match="closed"):
        await bench.writer.run(lambda _conn: 0)


async def test_too_many_waiting_writes_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.store.writer.MAX_PENDING_WRITES", 2)
    outcomes = await asyncio.gather(*(bench.add(n) for n in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, int, StoreUnavailable]


async def test_locked_database_fails_every_waiting_write_once(bench: Bench) -> None:
    """Not write by write: each would wait for the lock again."""
    attempts = 0

    def refuse(_conn: sa.Connection) -> None:
        nonlocal attempts
        attempts += 1
        raise StoreUnavailable("the database is locked or cannot be written")

    sa.event.listen(bench.database.writing, "begin", refuse)
    outcomes = await asyncio.gather(*(bench.add(n) for n in range(5)), return_exceptions=True)
    sa.event.remove(bench.database.writing, "begin", refuse)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 5
    assert attempts == 1
    assert await bench.add(9) == 9


async def test_reads_do_not_wait_for_the_writer(store: Store, database_url: str) -> None:
    await store.sessions.create(session(), None)
    blocker = Database.of(database_url)
    with blocker.writing.begin() as conn:
        conn.exec_driver_sql("DELETE FROM sessions")
        assert await store.sessions.get(session().session_id) == session()
        conn.rollback()
    await blocker.close()


async def test_many_clients_enqueue_while_others_read(store: Store) -> None:
    """Everything that was acknowledged is there, in heads, whatever the interleaving."""
    model_ids = [f"s1:train:{n}" for n in range(5)]
    await with_run(store, *model_ids)

    async def client(model_id: str) -> None:
        for seq_id in range(1, 21):
            request_id = await store.requests.enqueue(op(seq_id, model_id=model_id))
            assert await store.requests.get(request_id) is not None

    await asyncio.gather(*(client(model_id) for model_id in model_ids))
    heads = await store.requests.heads(op(1).pool)
    assert [[r.seq_id for r in line] for line in heads] == [list(range(21))] * 5


async def test_cancelled_read_does_not_harm_the_next(store: Store) -> None:
    await with_run(store)
    for _ in range(10):
        reading = asyncio.ensure_future(store.requests.future(RequestId(f"{MODEL}:0")))
        await asyncio.sleep(0)
        reading.cancel()
        assert await store.requests.future(RequestId(f"{MODEL}:0")) is not None


async def test_committed_rows_survive_a_reopen(database_url: str, clock: ManualClock) -> None:
    first = await Store.open(database_url, clock=clock.now)
    await with_run(first)
    await enqueue_all(first, [op(n, payload=bytes([n])) for n in (1, 2)])
    lease = await lead(first)
    await first.cycles.finish(lease, FinishedCycle(advances=(ModelAdvance(MODEL, 1),)))
    await first.close()
    await first.close()

    second = await Store.open(database_url, clock=clock.now)
    heads = await second.requests.heads(op(1).pool)
    assert [[r.seq_id for r in line] for line in heads] == [[0, 1, 2]]
    assert await second.requests.payload(op(2).request_id) == (b"\x02", None)
    assert await second.leases.current(op(1).pool) == lease
    await second.close()


async def test_acknowledged_requests_survive_sigkill(sqlite_url: str) -> None:
    """A process enqueues and says so, until it is killed; whatever it said is there."""
    here = Path(__file__)
    environment = {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(here.parent / "enqueue_until_killed.py"), sqlite_url, stdout=PIPE, env=environment
    )
    assert process.stdout is not None
    acknowledged = [int(await process.stdout.readline()) for _ in range(50)]
    process.kill()
    *whole_lines, _cut_off = (await process.stdout.read()).split(b"\n")
    acknowledged += map(int, whole_lines)
    assert await process.wait() == -signal.SIGKILL

    store = await Store.open(sqlite_url)
    found = await store.requests.payloads([op(seq_id).request_id for seq_id in acknowledged])
    await store.close()
    assert found == {op(seq_id).request_id: (str(seq_id).encode(), None) for seq_id in acknowledged}


async def test_closed_store_refuses(database_url: str) -> None:
    store = await Store.open(database_url)
    await store.ping()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.requests.enqueue(op(1))


@pytest.mark.parametrize(
    "url",
    ["mysql://localhost/x", "sqlite+other:////tmp/x.db", "sqlite://", "sqlite:///:memory:", "no url"],
)
async def test_unsupported_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="database"):
        await Store.open(url)


async def test_what_waits_behind_an_outage_is_refused_with_it(bench: Bench) -> None:
    """Whoever came while others waited for the database would else wait as long again."""
    attempts, has_begun, may_fail = 0, threading.Event(), threading.Event()

    def refuse(_conn: sa.Connection) -> None:
        nonlocal attempts
        attempts += 1
        has_begun.set()
        may_fail.wait(10)
        raise StoreUnavailable("the database is locked")

    sa.event.listen(bench.database.writing, "begin", refuse)
    first = asyncio.ensure_future(bench.add(1))
    await asyncio.to_thread(has_begun.wait, 10)
    behind = [asyncio.ensure_future(bench.add(n)) for n in range(2, 6)]
    await asyncio.sleep(0)
    may_fail.set()
    outcomes = await asyncio.gather(first, *behind, return_exceptions=True)
    sa.event.remove(bench.database.writing, "begin", refuse)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 5
    assert attempts == 1
    assert await bench.add(9) == 9


async def test_an_outage_during_one_by_one_ends_all_of_them(bench: Bench) -> None:
    attempts = 0

    def broken(_conn: sa.Connection) -> None:
        raise Fenced("mine")

    def refuse_the_second(_conn: sa.Connection) -> None:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            raise StoreUnavailable("the database is locked")

    sa.event.listen(bench.database.writing, "begin", refuse_the_second)
    outcomes = await asyncio.gather(bench.writer.run(broken), *(bench.add(n) for n in range(4)), return_exceptions=True)
    sa.event.remove(bench.database.writing, "begin", refuse_the_second)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 5
    assert attempts == 2
