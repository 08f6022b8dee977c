"""Leases: who leads a pool. It refuses to know what leading means, and whether a holder's process lives.

Invariant: tokens of a pool only grow, and each is given out once; whoever holds an older one can write nothing
(`fence`). Times are those of the database's clock on PostgreSQL, so that leaders on several machines need not agree on
one; on SQLite, which one machine uses, those of the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.records import LeaseRecord
from treadle.errors import Fenced, TreadleError
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.tables import AnyRow, leases
from treadle.store.writer import Writer
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# A lease is renewed so often before it ends.
RENEWALS_PER_TTL = 3

_COLUMNS = (leases.c.pool, leases.c.token, leases.c.holder, leases.c.expires_at, leases.c.cycle)
_IS_MINE = sa.and_(leases.c.pool == sa.bindparam("of_pool"), leases.c.token == sa.bindparam("my_token"))
_IN_FLIGHT = sa.select(leases.c.in_flight).where(leases.c.pool == sa.bindparam("of_pool"))
# The token stays: the next leader must get a larger one.
_RELEASE = leases.update().where(_IS_MINE).values(expires_at=0.0, holder="")
_BEGIN_CYCLE = leases.update().where(_IS_MINE).values(cycle=sa.bindparam("now_cycle"), in_flight=sa.bindparam("ids"))
_END_CYCLE = leases.update().where(_IS_MINE).values(in_flight=sa.bindparam("still"))
# Changes nothing, but takes the row's lock, so that no other leader gets in before this transaction ends.
_HOLD = leases.update().where(_IS_MINE).values(token=leases.c.token)


def fence(
    conn: sa.Connection, lease: LeaseRecord, *, ends_cycle: bool, still_in_flight: Sequence[RequestId] = ()
) -> None:
    """First statement of every write of a leader. Raises Fenced when its lease was taken over.

    still_in_flight: what other workers of the pool have when one's cycle ends.
    """
    if ends_cycle:
        ended = conn.execute(_END_CYCLE, _mine(lease) | {"still": list(still_in_flight)})
    else:
        ended = conn.execute(_HOLD, _mine(lease))
    _check(ended.rowcount, lease)


class LeaseStatements:
    """The statements that look at a clock. clock: used instead of the database's."""

    def __init__(self, dialect: Dialect, clock: Callable[[], float] | None) -> None:
        self._clock = clock
        of_database = dialect.now()
        assert clock is not None or of_database is not None, "a database without a clock needs one"
        self.now: sa.ColumnElement[float] = (
            of_database if clock is None and of_database is not None else sa.bindparam("now", type_=sa.Double)
        )
        until = self.now + sa.bindparam("ttl_s", type_=sa.Double)
        holders = (sa.bindparam("me", type_=sa.Text), sa.bindparam("dead", type_=sa.Text))
        self.take = (
            leases.update()
            .where(
                leases.c.pool == sa.bindparam("of_pool"),
                sa.or_(leases.c.expires_at <= self.now, leases.c.holder.in_(holders)),
            )
            .values(token=leases.c.token + 1, holder=sa.bindparam("me"), expires_at=until)
            .returning(*_COLUMNS)
        )
        self.renew = leases.update().where(_IS_MINE).values(expires_at=until)
        self.current = sa.select(*_COLUMNS).where(
            leases.c.pool == sa.bindparam("of_pool"), leases.c.expires_at > self.now
        )

    def clock_values(self) -> dict[str, float]:
        """What these statements need to be told of the time."""
        return {} if self._clock is None else {"now": self._clock()}


class Leases:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, events: Events, statements: LeaseStatements) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._statements = statements
        self._make_row = database.dialect.insert(leases).on_conflict_do_nothing(index_elements=[leases.c.pool])

    async def acquire(
        self, pool: PoolName, holder: str, ttl_s: float, *, instead_of: str | None = None
    ) -> LeaseRecord | None:
        """The lease with a token of its own, or None while somebody else's is alive.

        Given when the lease is free, expired, held under the same name (a holder that starts again fences itself), or
        by `instead_of`, a holder that the caller knows to be dead.
        """
        assert holder
        assert ttl_s > 0

        def write(conn: sa.Connection) -> LeaseRecord | None:
            never_held = {"pool": pool, "token": 0, "holder": "", "expires_at": 0.0, "cycle": 0, "in_flight": []}
            conn.execute(self._make_row, never_held)
            values = {"of_pool": pool, "me": holder, "dead": instead_of or holder, "ttl_s": ttl_s}
            row = conn.execute(self._statements.take, values | self._statements.clock_values()).one_or_none()
            return None if row is None else _record_of(row)

        return await self._writer.run(write)

    def keep(self, lease: LeaseRecord, ttl_s: float) -> LeaseRenewal:
        """Renew the lease from now on, until it is lost or the renewal is stopped."""
        return LeaseRenewal(self._database, self._statements, lease, ttl_s)

    async def release(self, lease: LeaseRecord) -> None:
        """Free the pool at once. Does nothing when the lease was taken over."""
        await self._writer.run(
            lambda conn: conn.execute(_RELEASE, _mine(lease)).rowcount,
            after_commit=lambda _: self._events.announce_pool(lease.pool),
        )

    async def current(self, pool: PoolName) -> LeaseRecord | None:
        """Who leads now; None when nobody does or the lease expired."""
        values = {"of_pool": pool, **self._statements.clock_values()}
        row = await self._database.read(lambda conn: conn.execute(self._statements.current, values).one_or_none())
        return None if row is None else _record_of(row)

    async def in_flight(self, pool: PoolName) -> tuple[RequestId, ...]:
        """What the last cycle handed to a worker and did not commit, as its leader noted it; for its successor."""
        values = {"of_pool": pool}
        ids = await self._database.read(lambda conn: conn.execute(_IN_FLIGHT, values).scalar_one_or_none())
        return tuple(RequestId(request_id) for request_id in ids or ())

    async def begin_cycle(self, lease: LeaseRecord, cycle: int, request_ids: Sequence[RequestId]) -> None:
        """Note what a worker is about to get. Raises Fenced."""
        values = _mine(lease) | {"now_cycle": cycle, "ids": list(request_ids)}
        await self._writer.run(lambda conn: _check(conn.execute(_BEGIN_CYCLE, values).rowcount, lease))


class LeaseRenewal:
    """Renews one lease in a thread and on a connection of its own.

    Neither an event loop that is busy nor a long line of writes can cost the lease. A database that does not answer
    ends nobody's lead either: only its row can say that somebody else has it.
    """

    def __init__(self, database: Database, statements: LeaseStatements, lease: LeaseRecord, ttl_s: float) -> None:
        self._database = database
        self._statements = statements
        self._lease = lease
        self._ttl_s = ttl_s
        self._loop = asyncio.get_running_loop()
        self._lost = asyncio.Event()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, name=f"lease {lease.pool}", daemon=True)
        self._thread.start()

    async def lost(self) -> None:
        """Return once another leader has taken the lease."""
        await self._lost.wait()

    async def stop(self) -> None:
        """Stop renewing, and return when no renewal is on its way any more. Idempotent."""
        self._is_stopping.set()
        await asyncio.to_thread(self._thread.join)

    def _renew_forever(self) -> None:
        while not self._is_stopping.is_set():
            try:
                with self._database.apart() as conn:
                    self._renew_on(conn)
            except TreadleError as error:
                log.warning("lease not renewed", pool=self._lease.pool, reason=error.message)
                self._pause()

    def _renew_on(self, conn: sa.Connection) -> None:
        while not self._pause():
            values = {**_mine(self._lease), "ttl_s": self._ttl_s, **self._statements.clock_values()}
            if conn.execute(self._statements.renew, values).rowcount == 0:
                self._is_stopping.set()
                self._loop.call_soon_threadsafe(self._lost.set)

    def _pause(self) -> bool:
        """Wait for the next renewal; True when there is none."""
        return self._is_stopping.wait(self._ttl_s / RENEWALS_PER_TTL)


def _mine(lease: LeaseRecord) -> dict[str, object]:
    return {"of_pool": lease.pool, "my_token": lease.token}


def _check(rowcount: int, lease: LeaseRecord) -> None:
    assert rowcount in (0, 1)
    if rowcount == 0:
        raise Fenced(f"another leader took pool {lease.pool}: token {lease.token} is no longer valid")


def _record_of(row: AnyRow) -> LeaseRecord:
    pool, token, holder, expires_at, cycle = row
    return LeaseRecord(pool=PoolName(pool), token=token, holder=holder, expires_at=expires_at, cycle=cycle)
