"""What an operator does to a database as a whole: look whether it is sound, copy it.

It refuses to repair anything and to touch blobs. Invariant: nothing here changes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import BlobKey
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.store import migrate
from treadle.store.blob_names import IS_UNNAMED_VERSION, KEYS_IN_USE
from treadle.store.dialect import parse_url
from treadle.store.engine import Database
from treadle.store.tables import sampling_sessions


def _page_of(*queries: sa.Select[Any]) -> sa.Select[Any]:
    """By key, without repetitions."""
    found = sa.union(*(query.with_only_columns(query.selected_columns[0].label("key")) for query in queries)).subquery()
    behind = sa.select(found.c.key).where(found.c.key > sa.bindparam("after"))
    return behind.order_by(found.c.key).limit(sa.bindparam("max_rows"))


_OF_SAMPLING = [query for query in KEYS_IN_USE if query.selected_columns[0].table is sampling_sessions]
_OTHERS = [query for query in KEYS_IN_USE if query.selected_columns[0].table is not sampling_sessions]
_NAMED_PAGE = _page_of(*_OTHERS, *(query.where(~IS_UNNAMED_VERSION) for query in _OF_SAMPLING))
_VERSIONS_PAGE = _page_of(*(query.where(IS_UNNAMED_VERSION) for query in _OF_SAMPLING))


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """A PostgreSQL database as its own tools take it: the URL holds no password."""

    url: str
    password: str | None


class Upkeep:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def schema_version(self) -> str | None:
        """The version of the schema that is there; None for an empty database."""
        return await self._database.read(migrate.version_of)

    async def problems(self) -> list[str]:
        """What the database itself finds wrong with its file and its references; nothing when it is sound."""
        return await self._database.read(self._database.dialect.problems)

    async def named_blobs(self, *, after: str = "") -> list[BlobKey]:
        """The next page of blobs that some row names, by key, behind `after`: those that came before their row."""
        return await self._keys(_NAMED_PAGE, after)

    async def unnamed_versions(self, *, after: str = "") -> list[BlobKey]:
        """The next page of blobs of weights that were saved without a name, by key, behind `after`.

        They may be on their way, and are lost with a machine that stops before.
        """
        return await self._keys(_VERSIONS_PAGE, after)

    async def _keys(self, page: sa.Select[Any], after: str) -> list[BlobKey]:
        values = {"after": after, "max_rows": MAX_PAGE_ROWS}
        keys = await self._database.read(lambda conn: conn.execute(page, values).scalars().all())
        return [BlobKey(key) for key in keys]

    async def copy_to(self, file: Path) -> None:
        """Write a copy as of one moment to a new SQLite file, while others read and write. SQLite only."""
        await self._database.read(lambda conn: self._database.dialect.copy(conn, file))


def postgres_address(url: str) -> PostgresAddress | None:
    """The address of a PostgreSQL database; None for any other. Raises ConfigError for a URL that is not supported."""
    parsed, dialect = parse_url(url)
    if dialect.is_sqlite:
        return None
    bare = parsed.set(drivername="postgresql", password=None)
    return PostgresAddress(bare.render_as_string(hide_password=False), parsed.password)
