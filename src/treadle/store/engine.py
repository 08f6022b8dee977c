"""Connections: one engine for the writer, one for readers, and what a database error means to the layers above.

It refuses to know tables. Invariants: a read never waits for the writer, and sees every write whose caller was
answered; no exception of SQLAlchemy leaves the store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from treadle.errors import ServerError, StoreUnavailable, TreadleError
from treadle.store.dialect import Dialect, parse_url
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

# Connections for reads. Each costs a thread with SQLite; more would only queue at the same two cores.
_MAX_READERS = 4
# How long a read waits for one of them.
_READER_TIMEOUT_S = 10.0


class Database:
    """The two engines of one store, on one event loop."""

    def __init__(self, *, dialect: Dialect, writing: AsyncEngine, reading: AsyncEngine) -> None:
        self.dialect = dialect
        self.writing = writing
        self._reading = reading

    @staticmethod
    def of(url: str) -> Database:
        """Engines for `url`; nothing is connected yet. Raises ConfigError for a URL that is not supported."""
        parsed, dialect = parse_url(url)
        options = dialect.engine_options() | {"json_serializer": _json, "max_overflow": 0}
        # Errors are logged, and bound values are prompts and digests of keys.
        options["hide_parameters"] = True
        writing = create_async_engine(parsed, pool_size=1, **options)
        reading = create_async_engine(
            parsed,
            pool_size=_MAX_READERS,
            pool_timeout=_READER_TIMEOUT_S,
            # Nothing to roll back when a connection returns, which would be one more hop to its thread.
            isolation_level="AUTOCOMMIT",
            pool_reset_on_return=None,
            skip_autocommit_rollback=True,
            **options,
        )
        for engine in (writing, reading):
            sa.event.listen(engine.sync_engine, "connect", lambda connection, _record: dialect.on_connect(connection))
        sa.event.listen(writing.sync_engine, "begin", dialect.on_begin)
        return Database(dialect=dialect, writing=writing, reading=reading)

    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        """What `query` returns. Each of its statements sees the newest commits; they share no snapshot."""
        with translated():
            async with self._reading.connect() as conn:
                return await conn.run_sync(query)

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        with translated():
            await self._reading.dispose()
            await self.writing.dispose()


@contextmanager
def translated() -> Iterator[None]:
    """SQLAlchemy's errors as ours."""
    try:
        yield
    except SQLAlchemyError as error:
        raise translate(error) from error


def translate(error: SQLAlchemyError) -> TreadleError:
    """Our error for one of SQLAlchemy's. The statement is logged, and never part of the message."""
    log.error("database failed", exc=error)
    if isinstance(error, IntegrityError):
        return ServerError("the database refused rows that contradict it")
    if isinstance(error, DBAPIError) and not error.connection_invalidated and not _is_outage(error):
        return ServerError("the database refused a statement")
    return StoreUnavailable("the database does not answer")


def _is_outage(error: DBAPIError) -> bool:
    """Locked, full, unreadable or gone, as opposed to a wrong statement or value."""
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)


# NaN and infinity are not JSON, and PostgreSQL refuses them; callers check before.
_json: Callable[[Any], str] = partial(json.dumps, separators=(",", ":"), allow_nan=False)
