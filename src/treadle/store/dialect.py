"""Everything in which SQLite and PostgreSQL differ: inserts that tolerate a conflict, connection set-up, locking.

It refuses to know tables and resources. Invariant: no other module of the store branches on the database's name.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from treadle.errors import ConfigError, StoreUnavailable

ConflictInsert: TypeAlias = sqlite.Insert | postgresql.Insert

# How long a write waits for another process (the command line, say) that holds SQLite's write lock.
_BUSY_TIMEOUT_MS = 5_000
# The write-ahead log is cut back to this size at a checkpoint; else it keeps the size of its worst moment.
_WAL_BYTES_MAX = 64 * 2**20
# Any number that no other user of the same PostgreSQL database takes as an advisory lock.
_MIGRATION_LOCK = 7_308_327_215
# The driver that is used for each name that a URL may give: synchronous ones, which the store runs in its own threads.
_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql+psycopg": "postgresql+psycopg"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """One database, seen from the statements: `name` is SQLAlchemy's ("sqlite", "postgresql")."""

    name: str

    @property
    def is_sqlite(self) -> bool:
        return self.name == "sqlite"

    def insert(self, table: sa.Table) -> ConflictInsert:
        """An INSERT with `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def engine_options(self) -> dict[str, Any]:
        """Options of create_engine for connections that only this store uses."""
        if self.is_sqlite:
            # The driver would else begin deferred transactions by itself; the engine says BEGIN IMMEDIATE instead.
            # A pool hands connections from thread to thread, one thread at a time.
            options = {"isolation_level": None, "timeout": _BUSY_TIMEOUT_MS / 1_000, "check_same_thread": False}
            return {"connect_args": options}
        return {"pool_pre_ping": True}

    def on_connect(self, dbapi_connection: Any) -> None:
        """Set up a fresh connection.

        WAL lets readers and the writer go on side by side; synchronous FULL makes a commit survive a power cut.
        """
        if not self.is_sqlite:
            return
        cursor = dbapi_connection.cursor()
        for pragma in (
            f"busy_timeout = {_BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "temp_store = MEMORY",
            f"journal_size_limit = {_WAL_BYTES_MAX}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(self, conn: sa.Connection) -> None:
        """Open a write transaction. A deferred one could fail half-way when it first writes.

        Raises StoreUnavailable when the lock is not free.
        """
        if not self.is_sqlite:
            return
        connection: Any = conn.connection.dbapi_connection
        assert isinstance(connection, sqlite3.Connection)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise StoreUnavailable("the database is locked or cannot be written") from error

    def lock_migrations(self, conn: sa.Connection) -> None:
        """Let one process at a time migrate, until the transaction ends. SQLite's write lock does that anyway."""
        if not self.is_sqlite:
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))


def parse_url(url: str) -> tuple[URL, Dialect]:
    """The parsed URL and its dialect. Raises ConfigError when the store has no adapter for it."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("the database URL cannot be parsed; use sqlite:////ABSOLUTE/PATH") from error
    if parsed.drivername not in _DRIVERS:
        raise ConfigError(f"database {parsed.drivername!r} is not supported; use sqlite:////ABSOLUTE/PATH")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        # Readers and the writer are separate connections, and each would see an empty database of its own.
        raise ConfigError("an in-memory database is not supported; name a file in the database URL")
    return parsed.set(drivername=_DRIVERS[parsed.drivername]), Dialect(parsed.get_backend_name())
