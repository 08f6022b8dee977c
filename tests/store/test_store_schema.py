"""Migrations build the schema that the statements expect, and queries use the indexes made for them."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects import postgresql, sqlite
from store_builders import op, with_run

from treadle.errors import ConfigError, StoreUnavailable
from treadle.store import Store, migrate
from treadle.store.engine import Database
from treadle.store.requests import _COUNT_QUEUED_OF_TENANT, _DROP_STALE_RESULTS, _KNOWN_SEQ_IDS, HEADS, QUEUED_SAMPLES
from treadle.store.sampling import COMPLETIONS
from treadle.store.tables import metadata


async def test_empty_database_is_upgraded_once(database_url: str) -> None:
    store = await Store.open(database_url, migrate=False)
    assert not await store.schema_is_current()
    await store.close()
    for _ in range(2):
        store = await Store.open(database_url)
        assert await store.schema_is_current()
        await store.close()


async def test_migrated_schema_is_the_declared_one(store: Store) -> None:
    def differences(conn: sa.Connection) -> list[object]:
        context = MigrationContext.configure(conn, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))

    assert await store._database.read(differences) == []


async def test_migrated_ddl_is_the_declared_one(store: Store, tmp_path: Path) -> None:
    """Comparing by reflection overlooks conditions of partial indexes and names of constraints; the DDL has them."""
    declared = sa.create_engine(f"sqlite:///{tmp_path}/declared.db")
    metadata.create_all(declared)
    with declared.connect() as conn:
        expected = ddl(conn)
    declared.dispose()
    found = await store._database.read(ddl)
    found.pop("alembic_version", None)
    assert found == expected
    assert "ix_requests_line" in found


async def test_database_of_a_newer_treadle_is_refused(database_url: str) -> None:
    store = await Store.open(database_url)
    await store._writer.run(
        lambda conn: conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'").rowcount
    )
    assert not await store.schema_is_current()
    await store.close()
    with pytest.raises(ConfigError, match="newer"):
        await Store.open(database_url)


async def test_failed_migration_leaves_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDL and version are one transaction, also in SQLite, where Alembic by itself would not make it one."""
    upgrade = migrate.upgrade

    def upgrade_then_die(conn: sa.Connection, dialect: object) -> None:
        upgrade(conn, dialect)  # type: ignore[arg-type]
        raise ConfigError("died")

    monkeypatch.setattr(migrate, "upgrade", upgrade_then_die)
    with pytest.raises(ConfigError, match="died"):
        await Store.open(database_url)
    database = Database.of(database_url)
    assert await database.read(lambda conn: sa.inspect(conn).get_table_names()) == []
    await database.close()


async def test_directory_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await Store.open(f"sqlite+aiosqlite:///{tmp_path}/missing/treadle.db")


async def test_sqlite_is_set_up_to_survive_a_power_cut(store: Store) -> None:
    def pragmas(conn: sa.Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [conn.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

    assert await store._database.read(pragmas) == ["wal", 2, 1, 5000]
    async with store._database.writing.connect() as conn:
        assert await conn.run_sync(pragmas) == ["wal", 2, 1, 5000]


@pytest.mark.parametrize(
    ("name", "statement", "index"),
    [
        ("heads", HEADS, "ix_requests_line"),
        ("queued samples", QUEUED_SAMPLES, "ix_requests_queued_samples"),
        ("completions", COMPLETIONS, "ix_requests_finished_samples"),
        ("known seq ids", _KNOWN_SEQ_IDS, "ix_requests_model_seq"),
        ("count queued", _COUNT_QUEUED_OF_TENANT, "ix_requests_queued_of_tenant"),
    ],
)
async def test_hot_query_uses_its_partial_index(
    store: Store, name: str, statement: sa.Select[object], index: str
) -> None:
    await with_run(store)
    await store.requests.enqueue(op(1))
    plan = await store._database.read(lambda conn: plan_of(conn, statement))
    assert any(index in line for line in plan), (name, plan)
    assert not any(re.match(r"SCAN requests\b(?!.*INDEX)", line) for line in plan), (name, plan)
    assert not any("TEMP B-TREE" in line for line in plan if name != "heads"), (name, plan)


async def test_heads_ranks_on_the_index_alone(store: Store) -> None:
    plan = await store._database.read(lambda conn: plan_of(conn, HEADS))
    assert any("COVERING INDEX ix_requests_line" in line for line in plan), plan


async def test_sweep_searches_by_age(store: Store) -> None:
    plan = await store._database.read(lambda conn: plan_of(conn, _DROP_STALE_RESULTS))
    assert any("ix_results_finished_at" in line for line in plan), plan
    assert not any(line.startswith("SCAN") for line in plan), plan


def test_schema_and_hot_queries_compile_for_postgresql() -> None:
    dialect = postgresql.dialect()
    for table in metadata.sorted_tables:
        sa.schema.CreateTable(table).compile(dialect=dialect)
        for index in table.indexes:
            sa.schema.CreateIndex(index).compile(dialect=dialect)
    for statement in (HEADS, QUEUED_SAMPLES, COMPLETIONS, _DROP_STALE_RESULTS):
        assert "?" not in str(statement.compile(dialect=dialect))


def ddl(conn: sa.Connection) -> dict[str, str]:
    """Name -> CREATE statement of everything that has one, with spaces evened out."""
    rows = conn.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: re.sub(r"\s+", " ", text) for name, text in rows}


def plan_of(conn: sa.Connection, statement: sa.Executable) -> list[str]:
    """SQLite's plan of a statement as it is really executed: with bound values."""
    compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"))  # type: ignore[attr-defined]
    values = dict.fromkeys(compiled.params, 1)
    assert sqlite3.paramstyle == "qmark"
    return [row[-1] for row in conn.execute(sa.text(f"EXPLAIN QUERY PLAN {compiled}"), values)]
