"""Everything in which SQLite and PostgreSQL differ: inserts that tolerate a conflict, connections, locks, the clock.

It refuses to know tables and resources. Invariant: no other module of the store branches on the database's name.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from treadle.errors import ConfigError, StoreUnavailable

ConflictInsert: TypeAlias = sqlite.Insert | postgresql.Insert

# How long a write waits for another process (the command line, say) that holds SQLite's write lock.
_BUSY_TIMEOUT_MS = 5_000
# The write-ahead log is cut back to this size at a checkpoint; else it keeps the size of its worst moment.
_WAL_BYTES_MAX = 64 * 2**20
# Any number that no other user of the same PostgreSQL database takes as an advisory lock.
_MIGRATION_LOCK = 7_308_327_215
# The driver that is used for each name that a URL may give: synchronous ones, which the store runs in its own threads.
_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_SUPPORTED = "sqlite:////ABSOLUTE/PATH or postgresql://USER@HOST/DATABASE"
# A machine that vanished is noticed in about ten seconds, on connections that are idle and on those that wait.
_POSTGRESQL_OPTIONS = {
    "application_name": "treadle",
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# Two transactions waited for each other, or saw each other's rows change: the same write succeeds when it is repeated.
_CONFLICT_STATES = frozenset({"40P01", "40001"})
_LOST = "the database does not answer"
_FULL = "the disk under the database is full"
_LOCKED = "the database is locked by another process"
_READ_ONLY = "the database cannot be written"
_BROKEN = "the database cannot use its files"
# Errors that no statement and no value is to blame for: what they are called, by PostgreSQL's states or classes of
# them, longest first, and by SQLite's primary result codes.
_OUTAGES_BY_STATE = {
    "25006": _READ_ONLY,
    "53100": _FULL,
    "53300": "the database takes no more connections",
    "57P": f"{_LOST}: it is starting or stopping",
    "08": _LOST,
    "53": "the database is out of memory",
    "58": _BROKEN,
    "F0": _BROKEN,
    "XX": _BROKEN,
}
_OUTAGES_BY_CODE = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_NOMEM: "the database is out of memory",
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: "the database cannot be opened",
    sqlite3.SQLITE_IOERR: _BROKEN,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_CORRUPT: "the database is damaged; `treadle db check` says how",
    sqlite3.SQLITE_NOTADB: "the database is damaged; `treadle db check` says how",
}
# More than anybody reads.
_MAX_PROBLEMS = 100
# States of errors whose first line quotes the value that was refused.
_DATA_ERRORS = "22"


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

    def has_pair(self, column: sa.Column[Any], name: str, value: str) -> sa.ColumnElement[bool]:
        """Whether a JSON object of texts has this pair. By comparison: a name may hold whatever means something in a
        path."""
        pairs = sa.func.json_each(column) if self.is_sqlite else sa.func.json_each_text(column)
        table = pairs.table_valued("key", "value")
        return sa.exists().where(table.c.key == name, table.c.value == value)

    def engine_options(self) -> dict[str, Any]:
        """Options of create_engine for connections that only this store uses."""
        if self.is_sqlite:
            # The driver would else begin deferred transactions by itself; the engine says BEGIN IMMEDIATE instead.
            # A pool hands connections from thread to thread, one thread at a time.
            options = {"isolation_level": None, "timeout": _BUSY_TIMEOUT_MS / 1_000, "check_same_thread": False}
            return {"connect_args": options}
        return {"pool_pre_ping": True, "connect_args": _POSTGRESQL_OPTIONS}

    @property
    def can_notify(self) -> bool:
        """Whether the database can tell other processes that something happened (LISTEN, NOTIFY)."""
        return not self.is_sqlite

    def now(self) -> sa.ColumnElement[float] | None:
        """The database's clock in seconds since the epoch, as it is when the row is written, even if that waited for a
        lock. None for SQLite, which has no clock but that of the process."""
        if self.is_sqlite:
            return None
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)

    def is_conflict(self, error: BaseException) -> bool:
        """Whether a transaction failed only because of another one at the same time."""
        return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _CONFLICT_STATES

    def outage(self, error: BaseException) -> str | None:
        """What keeps the database from working, in words for a client; None when a statement or a value is at fault."""
        if isinstance(error, StoreUnavailable):
            return error.message
        if not isinstance(error, DBAPIError):
            # A pool that gives out no connection within its time, say.
            return _LOST if isinstance(error, SQLAlchemyError) else None
        if isinstance(error.orig, sqlite3.Error):
            return _outage_of(error.orig)
        state = getattr(error.orig, "sqlstate", None)
        if state is not None:
            return next((words for start, words in _OUTAGES_BY_STATE.items() if state.startswith(start)), None)
        # The driver's own words: it found no server, or lost it.
        is_lost = error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
        return _LOST if is_lost else None

    def describe(self, error: SQLAlchemyError) -> str:
        """What the log may say of an error: never a value of a row, which PostgreSQL's details are full of."""
        original = error.orig if isinstance(error, DBAPIError) else error
        said = getattr(original, "diag", None)
        if said is None or said.message_primary is None:
            return str(original)  # SQLite's, or the driver's own: the connection failed
        state = said.sqlstate or ""
        reason = type(original).__name__ if state.startswith(_DATA_ERRORS) else said.message_primary
        return f"{reason} (SQLSTATE {state})"

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
            raise StoreUnavailable(_outage_of(error) or _READ_ONLY) from error

    def lock_migrations(self, conn: sa.Connection) -> None:
        """Let one process at a time migrate, until the transaction ends. SQLite's write lock does that anyway."""
        if not self.is_sqlite:
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))

    def lock(self, conn: sa.Connection, name: str) -> None:
        """Let one write transaction at a time go on that names this, until it ends. SQLite has one at a time anyway."""
        if not self.is_sqlite:
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))

    def problems(self, conn: sa.Connection) -> list[str]:
        """What the database finds wrong with itself. PostgreSQL enforces what SQLite only checks when it is asked."""
        if not self.is_sqlite:
            return []
        damage = [str(row[0]) for row in conn.exec_driver_sql(f"PRAGMA integrity_check({_MAX_PROBLEMS})")]
        dangling = conn.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(_MAX_PROBLEMS)
        return [
            *(line for line in damage if line != "ok"),
            *(f"row {row[1]} of table {row[0]} refers to a row of {row[2]} that is not there" for row in dangling),
        ]

    def copy(self, conn: sa.Connection, file: Path) -> None:
        """Copy SQLite's database, as of one moment, into a new file. Raises StoreUnavailable."""
        assert self.is_sqlite, "PostgreSQL has tools of its own for this"
        source: Any = conn.connection.dbapi_connection
        assert isinstance(source, sqlite3.Connection)
        try:
            with closing(sqlite3.connect(file)) as target:
                source.backup(target)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the database could not be copied: {error}") from error


def _outage_of(error: sqlite3.Error) -> str | None:
    # Errors that the driver finds by itself have no code. The low byte is the kind, the rest its circumstances.
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else _OUTAGES_BY_CODE.get(code & 0xFF)


def parse_url(url: str) -> tuple[URL, Dialect]:
    """The parsed URL and its dialect. Raises ConfigError when the store has no adapter for it."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"the database URL cannot be parsed; use {_SUPPORTED}") from error
    if parsed.drivername not in _DRIVERS:
        raise ConfigError(f"database {parsed.drivername!r} is not supported; use {_SUPPORTED}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        # Readers and the writer are separate connections, and each would see an empty database of its own.
        raise ConfigError("an in-memory database is not supported; name a file in the database URL")
    return parsed.set(drivername=_DRIVERS[parsed.drivername]), Dialect(parsed.get_backend_name())
