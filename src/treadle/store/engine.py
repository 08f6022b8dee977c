"""Connections: one for the writer, some for readers, those apart, and what a database error means above.

Drivers are synchronous and run in threads of their own (see lanes.py): an asynchronous one hops to its thread for each
call of the driver, five times for one query, which costs more than the query. It refuses to know tables. Invariants:
a read never waits for the writer, and sees every write whose caller was answered; no exception of SQLAlchemy leaves
the store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from treadle.domain.limits import MAX_PENDING_WRITES
from treadle.errors import ConfigError, ServerError, StoreUnavailable, TreadleError
from treadle.store.dialect import Dialect, parse_url
from treadle.store.lanes import Lanes
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

# Threads for reads, each with a connection. One long listing holds up none but its own; more than two would only
# take turns with the event loop at Python's lock.
_NUM_READERS = 2
# Reads that may wait for one of them: seconds of their work.
_MAX_PENDING_READS = 10_000


class Database:
    """The connections of one store, on one event loop."""

    def __init__(self, *, dialect: Dialect, writing: sa.Engine, reading: sa.Engine, apart: sa.Engine) -> None:
        self.dialect = dialect
        self.writing = writing
        self._reading = reading
        self._apart = apart
        self._outage = Outage(dialect, "reads")
        self._readers: Lanes[sa.Connection] = Lanes(
            "store-read", count=_NUM_READERS, max_waiting=_MAX_PENDING_READS, call=self._on_reader
        )
        self._writer: Lanes[sa.Connection] = Lanes(
            "store-write", count=1, max_waiting=MAX_PENDING_WRITES, call=self._in_transaction
        )

    @staticmethod
    def of(url: str) -> Database:
        """Connections to `url`; nothing is connected yet.

        Raises ConfigError for a URL that is not supported, and when its driver is not installed.
        """
        parsed, dialect = parse_url(url)
        # Errors are logged, and bound values are prompts and digests of keys.
        options = dialect.engine_options() | {"json_serializer": _json, "hide_parameters": True}
        # Nothing to roll back when a connection returns.
        single = {"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None, "skip_autocommit_rollback": True}
        try:
            writing = sa.create_engine(parsed, pool_size=1, max_overflow=0, **options)
        except ModuleNotFoundError as error:
            raise ConfigError("PostgreSQL needs its driver: pip install 'treadle[postgres]'") from error
        reading = sa.create_engine(parsed, pool_size=_NUM_READERS, max_overflow=0, **options, **single)
        apart = sa.create_engine(parsed, poolclass=NullPool, **options, **single)
        for engine in (writing, reading, apart):
            sa.event.listen(engine, "connect", lambda connection, _record: dialect.on_connect(connection))
        sa.event.listen(writing, "begin", dialect.on_begin)
        return Database(dialect=dialect, writing=writing, reading=reading, apart=apart)

    @contextmanager
    def apart(self) -> Iterator[sa.Connection]:
        """A fresh connection for a thread that waits for nobody else; each statement is a transaction.

        Errors of the database inside are raised as ours.
        """
        with translated(self.dialect), self._apart.connect() as conn:
            yield conn

    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        """What `query` returns. Each of its statements sees the newest commits; they share no snapshot."""
        try:
            found = await self._readers.run(query)
        except SQLAlchemyError as error:
            raise self._outage.translated(error) from error
        self._outage.is_over()
        return found

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returned in a transaction of its own, once that is durable. Raises what `work` raises."""
        return await self._writer.run(work)

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        await self._readers.close()
        await self._writer.close()
        with translated(self.dialect):
            self._reading.dispose()
            self._apart.dispose()
            self.writing.dispose()

    def _on_reader(self, query: Callable[[sa.Connection], T]) -> T:
        with self._reading.connect() as conn:
            return query(conn)

    def _in_transaction(self, work: Callable[[sa.Connection], T]) -> T:
        with self.writing.connect() as conn, conn.begin():
            return work(conn)


class Outage:
    """Errors of one kind of work as ours. An outage is logged when it begins and when it is over, and not per failure:
    there may be thousands a second, on a disk that is full."""

    def __init__(self, dialect: Dialect, what: str) -> None:
        self._dialect = dialect
        self._what = what
        self._num_failures = 0

    def translated(self, error: SQLAlchemyError | StoreUnavailable) -> TreadleError:
        """Our error for one of the database's."""
        words = self._dialect.outage(error)
        if words is None:
            assert isinstance(error, SQLAlchemyError), "StoreUnavailable is an outage"
            return translate(error, self._dialect)
        if self._num_failures == 0:
            # One that SQLAlchemy never saw, SQLite's lock say, is all words.
            reason = self._dialect.describe(error) if isinstance(error, SQLAlchemyError) else str(error.__cause__ or "")
            log.error("database outage", what=self._what, error=words, reason=reason)
        self._num_failures += 1
        return StoreUnavailable(words)

    def is_over(self) -> None:
        """Something worked."""
        if self._num_failures:
            log.info("database outage over", what=self._what, failures=self._num_failures)
            self._num_failures = 0


@contextmanager
def translated(dialect: Dialect) -> Iterator[None]:
    """SQLAlchemy's errors as ours."""
    try:
        yield
    except SQLAlchemyError as error:
        raise translate(error, dialect) from error


def translate(error: SQLAlchemyError, dialect: Dialect) -> TreadleError:
    """Our error for one of SQLAlchemy's. Reason and statement are logged, and never part of the message."""
    statement = error.statement if isinstance(error, DBAPIError) else None
    log.error("database failed", error=type(error).__name__, reason=dialect.describe(error), statement=statement or "")
    if (words := dialect.outage(error)) is not None:
        return StoreUnavailable(words)
    if isinstance(error, IntegrityError):
        return ServerError("the database refused rows that contradict it")
    return ServerError("the database refused a statement")


# NaN and infinity are not JSON, and PostgreSQL refuses them; callers check before.
_json: Callable[[Any], str] = partial(json.dumps, separators=(",", ":"), allow_nan=False)
