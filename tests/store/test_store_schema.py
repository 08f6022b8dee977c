"""Migrations build the schema that the statements expect."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects import postgresql

from treadle.errors import ConfigError
from treadle.store import Store, migrate
from treadle.store.engine import Database
from treadle.store.heads import HEAD_IDS
from treadle.store.requests import _DROP_STALE_RESULTS, QUEUED_SAMPLES
from treadle.store.sampling import COMPLETIONS
from treadle.store.tables import metadata


async def test_empty_database_is_upgraded_once(empty_database_url: str) -> None:
    store = await Store.open(empty_database_url, migrate=False)
    assert not await store.schema_is_current()
    await store.close()
    for _ in range(2):
        store = await Store.open(empty_database_url)
        assert await store.schema_is_current()
        await store.close()


async def test_migrated_schema_is_the_declared_one(store: Store) -> None:
    def differences(conn: sa.Connection) -> list[object]:
        context = MigrationContext.configure(conn, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, metadata))

    assert await store._database.read(differences) == []


async def test_database_of_a_newer_treadle_is_refused(empty_database_url: str) -> None:
    store = await Store.open(empty_database_url)
    await store._writer.run(
        lambda conn: conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'").rowcount
    )
    assert not await store.schema_is_current()
    await store.close()
    with pytest.raises(ConfigError, match="newer"):
        await Store.open(empty_database_url)


async def test_failed_migration_leaves_nothing(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDL and version are one transaction, also in SQLite, where Alembic by itself would not make it one."""
    upgrade = migrate.upgrade

    def upgrade_then_die(conn: sa.Connection, dialect: object) -> None:
        upgrade(conn, dialect)  # type: ignore[arg-type]
        raise ConfigError("died")

    monkeypatch.setattr(migrate, "upgrade", upgrade_then_die)
    with pytest.raises(ConfigError, match="died"):
        await Store.open(empty_database_url)
    database = Database.of(empty_database_url)
    assert await database.read(lambda conn: sa.inspect(conn).get_table_names()) == []
    await database.close()


def test_schema_and_hot_queries_compile_for_postgresql() -> None:
    dialect = postgresql.dialect()
    for table in metadata.sorted_tables:
        sa.schema.CreateTable(table).compile(dialect=dialect)
        for index in table.indexes:
            sa.schema.CreateIndex(index).compile(dialect=dialect)
    for statement in (HEAD_IDS, QUEUED_SAMPLES, COMPLETIONS, _DROP_STALE_RESULTS):
        assert "?" not in str(statement.compile(dialect=dialect))
