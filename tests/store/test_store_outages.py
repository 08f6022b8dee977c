"""A database that is full, locked, gone or killed: what callers are told, what is tried again, and what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa
from store_builders import session

from treadle.domain.ids import SessionId
from treadle.errors import ServerError, StoreUnavailable
from treadle.store import Store


async def test_a_full_disk_is_named_and_logged_once(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="treadle.store")
    store = await Store.open(sqlite_url)
    pages = await store._database.write(lambda conn: conn.exec_driver_sql("PRAGMA page_count").scalar_one())
    await store._database.write(lambda conn: conn.exec_driver_sql(f"PRAGMA max_page_count = {pages}").scalar_one())
    many = [replace(session(f"s{n}"), user_metadata={"text": "x" * 8_000}) for n in range(20)]
    for _ in range(3):
        outcomes = await asyncio.gather(*(store.sessions.create(one) for one in many), return_exceptions=True)
        assert {str(outcome) for outcome in outcomes} == {"the disk under the database is full"}
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
    assert [record.message for record in caplog.records] == ["database outage"]
    await store._database.write(lambda conn: conn.exec_driver_sql("PRAGMA max_page_count = 100000").scalar_one())
    assert await asyncio.gather(*(store.sessions.create(one) for one in many)) == many
    assert [record.message for record in caplog.records] == ["database outage", "database outage over"]
    await store.close()


def raising(state: str) -> Callable[[sa.Connection], None]:
    """A write that PostgreSQL ends with this SQLSTATE."""

    def write(conn: sa.Connection) -> None:
        conn.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")

    return write


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("state", "words"),
    [("53100", "disk under the database is full"), ("57P03", "starting or stopping"), ("25006", "cannot be written")],
)
async def test_postgresqls_outages_are_named(postgres_url: str, state: str, words: str) -> None:
    store = await Store.open(postgres_url)
    with pytest.raises(StoreUnavailable, match=words):
        await store._writer.run(raising(state))
    await store.close()


@pytest.mark.postgres
@pytest.mark.parametrize("state", ["54000", "57014", "22021", "42P01"])
async def test_a_statement_at_fault_is_no_outage(postgres_url: str, state: str) -> None:
    """SQLAlchemy calls some of these operational; a client that is told to come again would do so for ever."""
    store = await Store.open(postgres_url)
    outcomes = await asyncio.gather(
        store._writer.run(raising(state)), store.sessions.create(session()), return_exceptions=True
    )
    assert type(outcomes[0]) is ServerError
    assert outcomes[1] == session()
    await store.close()


@pytest.mark.postgres
async def test_a_connection_that_dies_in_a_transaction_costs_no_write(postgres_url: str) -> None:
    store = await Store.open(postgres_url)
    num_deaths = 0

    def die_once(conn: sa.Connection) -> int:
        nonlocal num_deaths
        if num_deaths == 0:
            num_deaths += 1
            conn.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        return 7

    made = [session(f"s{n}") for n in range(3)]
    assert await asyncio.gather(
        store.sessions.create(made[0]), store.sessions.create(made[1]), store._writer.run(die_once)
    ) == [made[0], made[1], 7]
    num_deaths = 0
    assert await store._writer.run(die_once) == 7
    assert await store.sessions.create(made[2]) == made[2]
    await store.close()


@pytest.mark.postgres
async def test_servers_that_lock_the_same_rows_in_another_order_both_get_through(postgres_url: str) -> None:
    """One of them is the victim of a deadlock, and its writes are repeated."""
    stores = [await Store.open(postgres_url) for _ in range(2)]
    for n in range(2):
        await stores[0].sessions.create(session(f"s{n}"))
    both_hold_one = threading.Barrier(2)

    def cross(order: tuple[str, str]) -> Callable[[sa.Connection], int]:
        def write(conn: sa.Connection) -> int:
            for index, session_id in enumerate(order):
                conn.exec_driver_sql(
                    f"UPDATE sessions SET sdk_version = sdk_version || 'x' WHERE session_id = '{session_id}'"
                )
                if index == 0:
                    with contextlib.suppress(threading.BrokenBarrierError):
                        both_hold_one.wait(1)
            return 1

        return write

    done = await asyncio.gather(stores[0]._writer.run(cross(("s0", "s1"))), stores[1]._writer.run(cross(("s1", "s0"))))
    assert done == [1, 1]
    for session_id in ("s0", "s1"):
        found = await stores[0].sessions.get(SessionId(session_id))
        assert found is not None
        assert found.sdk_version == "0.38xx"
    for store in stores:
        await store.close()
