"""What tests of several packages share: databases with today's schema, and one throw-away PostgreSQL for the whole run.

To migrate a database takes longer than most tests, so it is done once for each kind: SQLite's file is copied, and
PostgreSQL's tests empty one database in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from treadle.store import Store
from treadle.store.tables import metadata
from treadle.testing.postgres import ThrowAwayPostgres, why_not

_SHARED = "treadle_shared"
# A test that left a transaction open fails the next one, and does not hang it.
_PATIENCE = "5s"


async def _migrate(url: str) -> None:
    await (await Store.open(url)).close()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with today's schema, to copy."""
    file = tmp_path_factory.mktemp("template") / "treadle.db"
    asyncio.run(_migrate(f"sqlite:///{file}"))
    return file


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A database with today's schema, for this test alone: the file `treadle.db` in its directory."""
    return f"sqlite:///{shutil.copyfile(sqlite_template, tmp_path / 'treadle.db')}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[ThrowAwayPostgres]:
    """A cluster; skips the test where none can be started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with ThrowAwayPostgres() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _shared_postgres_url(postgres: ThrowAwayPostgres) -> str:
    url = postgres.create(_SHARED)
    asyncio.run(_migrate(url))
    return url


@pytest.fixture(scope="session")
def _database_names() -> Iterator[str]:
    return (f"test_{number}" for number in itertools.count())


@pytest.fixture
def new_postgres_url(postgres: ThrowAwayPostgres, _database_names: Iterator[str]) -> Iterator[Callable[[], str]]:
    """Makes databases without a schema, for this test alone."""
    made: list[str] = []

    def make() -> str:
        made.append(next(_database_names))
        return postgres.create(made[-1])

    yield make
    for name in made:
        postgres.drop(name)


@pytest.fixture
def postgres_url(_shared_postgres_url: str) -> str:
    """A database with today's schema and nothing in it. Tests take turns with it: what they add to the schema, they
    take away."""
    with psycopg.connect(_shared_postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"SET lock_timeout = '{_PATIENCE}'")
        # TRUNCATE takes 15 ms, for the files that it makes anew.
        for table in reversed(metadata.sorted_tables):
            connection.execute(f'DELETE FROM "{table.name}"'.encode())
            for column in table.primary_key:
                if isinstance(column.type, sa.Integer) and column.autoincrement is True:
                    numbers = f"pg_get_serial_sequence('{table.name}', '{column.name}')"
                    connection.execute(f"SELECT setval({numbers}, 1, false)".encode())
    return _shared_postgres_url
