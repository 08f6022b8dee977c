"""What only holds for SQLite: the DDL, the pragmas, query plans, and its one write lock."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from store_builders import op, session, with_run

from treadle.errors import StoreUnavailable
from treadle.store import Store
from treadle.store.backlog import BACKLOG
from treadle.store.blob_names import NAMED
from treadle.store.engine import Database
from treadle.store.heads import HEAD_IDS
from treadle.store.requests import (
    _DROP_STALE_RESULTS,
    _KNOWN_SEQ_IDS,
    _NEWEST_END,
    LOG,
    QUEUED_SAMPLES,
)
from treadle.store.sampling import COMPLETIONS
from treadle.store.snapshots import _NEWEST_LOAD, _RETAINED, RETIRABLE
from treadle.store.tables import metadata


async def test_migrated_ddl_is_the_declared_one(sqlite_store: Store, tmp_path: Path) -> None:
    """Comparing by reflection overlooks conditions of partial indexes and names of constraints; the DDL has them."""
    declared = sa.create_engine(f"sqlite:///{tmp_path}/declared.db")
    metadata.create_all(declared)
    with declared.connect() as conn:
        expected = ddl(conn)
    declared.dispose()
    found = await sqlite_store._database.read(ddl)
    found.pop("alembic_version", None)
    assert found == expected
    assert "ix_requests_line" in found


async def test_directory_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await Store.open(f"sqlite:///{tmp_path}/missing/treadle.db")


async def test_sqlite_is_set_up_to_survive_a_power_cut(sqlite_store: Store) -> None:
    def pragmas(conn: sa.Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [conn.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

    assert await sqlite_store._database.read(pragmas) == ["wal", 2, 1, 5000]
    assert await sqlite_store._database.write(pragmas) == ["wal", 2, 1, 5000]


# These put ranks or sums in order at the end, which takes a sort of the rows that count.
RANKED = ("heads", "queued samples", "backlog")


@pytest.mark.parametrize(
    ("name", "statement", "index"),
    [
        ("heads", HEAD_IDS, "ix_requests_line"),
        ("queued samples", QUEUED_SAMPLES, "ix_requests_queued_samples"),
        ("completions", COMPLETIONS, "ix_requests_finished_samples"),
        ("known seq ids", _KNOWN_SEQ_IDS, "ix_requests_model_seq"),
        ("backlog", BACKLOG, "ix_requests_queued_of_tenant"),
        ("log", LOG, "ix_requests_model_seq"),
        ("newest step", _NEWEST_END, "ix_requests_model_seq"),
        ("newest load", _NEWEST_LOAD, "ix_requests_model_seq"),
        ("retirement", RETIRABLE, "ix_requests_model_seq"),
        ("retained payloads", _RETAINED, "ix_requests_model_seq"),
    ],
)
async def test_hot_query_uses_its_partial_index(
    sqlite_store: Store, name: str, statement: sa.Select[object], index: str
) -> None:
    await with_run(sqlite_store)
    await sqlite_store.requests.enqueue(op(1))
    plan = await sqlite_store._database.read(lambda conn: plan_of(conn, statement))
    assert any(index in line for line in plan), (name, plan)
    assert not any(re.match(r"SCAN requests\b(?!.*INDEX)", line) for line in plan), (name, plan)
    assert not any("TEMP B-TREE" in line for line in plan if name not in RANKED), (name, plan)


async def test_heads_are_found_on_the_index_alone(sqlite_store: Store) -> None:
    plan = await sqlite_store._database.read(lambda conn: plan_of(conn, HEAD_IDS))
    assert any("COVERING INDEX ix_requests_line" in line for line in plan), plan


async def test_each_search_for_a_name_of_a_blob_uses_an_index(sqlite_store: Store) -> None:
    for statement in NAMED:
        asked = statement.params(keys=["a"])
        (line,) = await sqlite_store._database.read(lambda conn, asked=asked: plan_of(conn, asked))
        assert re.search(r"USING (COVERING )?INDEX ix_\w+_key\b", line), line


async def test_sweep_searches_by_age(sqlite_store: Store) -> None:
    plan = await sqlite_store._database.read(lambda conn: plan_of(conn, _DROP_STALE_RESULTS))
    assert any("ix_results_finished_at" in line for line in plan), plan
    assert not any(line.startswith("SCAN") for line in plan), plan


async def test_lock_of_another_process_is_reported(sqlite_store: Store, sqlite_url: str) -> None:
    await sqlite_store.sessions.create(session(), None)
    blocker = Database.of(sqlite_url)
    await sqlite_store._database.write(lambda conn: conn.exec_driver_sql("PRAGMA busy_timeout = 1"))
    with blocker.writing.begin(), pytest.raises(StoreUnavailable, match="locked"):
        await sqlite_store.requests.enqueue(op(1))
    await blocker.close()
    assert await sqlite_store.sessions.get(session().session_id) == session()


def ddl(conn: sa.Connection) -> dict[str, list[str]]:
    """Name -> CREATE statement of everything that has one, in parts: the order of constraints means nothing."""
    rows = conn.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: sorted(re.sub(r"\s+|\)$", " ", text).strip().split(", ")) for name, text in rows}


def plan_of(conn: sa.Connection, statement: sa.Executable) -> list[str]:
    """SQLite's plan of a statement as it is really executed: with bound values."""
    dialect = sqlite.dialect(paramstyle="named")  # type: ignore[attr-defined]
    compiled = statement.compile(dialect=dialect)
    values = {name: 1 if value is None else value for name, value in compiled.params.items()}
    if isinstance(statement, sa.Select):
        # Lists of values are spelt out, one parameter each.
        spelt_out = {"render_postcompile": True}
        compiled = statement.params(values).compile(dialect=dialect, compile_kwargs=spelt_out)
        values = dict.fromkeys(re.findall(r":(\w+)", str(compiled)), 1)
    return [row[-1] for row in conn.execute(sa.text(f"EXPLAIN QUERY PLAN {compiled}"), values)]
