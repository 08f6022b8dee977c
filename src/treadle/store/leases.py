"""Leases: who leads a pool. It refuses to know what leading means.

Invariant: tokens of a pool only grow, and each is given out once; whoever holds an older one can write nothing
(`fence`). Times come from the store's clock, so leaders on several machines need clocks that agree to well within
the time to live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.records import LeaseRecord
from treadle.errors import Fenced
from treadle.store.engine import Database
from treadle.store.tables import AnyRow, leases
from treadle.store.writer import Writer

_COLUMNS = (leases.c.pool, leases.c.token, leases.c.holder, leases.c.expires_at, leases.c.cycle)
_IS_MINE = sa.and_(leases.c.pool == sa.bindparam("of_pool"), leases.c.token == sa.bindparam("my_token"))
_CURRENT = sa.select(*_COLUMNS).where(leases.c.pool == sa.bindparam("of_pool"))
_IN_FLIGHT = sa.select(leases.c.in_flight).where(leases.c.pool == sa.bindparam("of_pool"))
_TAKE = (
    leases.update()
    .where(
        leases.c.pool == sa.bindparam("of_pool"),
        sa.or_(leases.c.expires_at <= sa.bindparam("now"), leases.c.holder == sa.bindparam("me")),
    )
    .values(token=leases.c.token + 1, holder=sa.bindparam("me"), expires_at=sa.bindparam("until"))
    .returning(*_COLUMNS)
)
_RENEW = leases.update().where(_IS_MINE).values(expires_at=sa.bindparam("until"))
# The token stays: the next leader must get a larger one.
_RELEASE = leases.update().where(_IS_MINE).values(expires_at=0.0, holder="")
_BEGIN_CYCLE = leases.update().where(_IS_MINE).values(cycle=sa.bindparam("now_cycle"), in_flight=sa.bindparam("ids"))
_END_CYCLE = leases.update().where(_IS_MINE).values(in_flight=[])
# Changes nothing, but takes the row's lock, so that no other leader gets in before this transaction ends.
_HOLD = leases.update().where(_IS_MINE).values(token=leases.c.token)


def fence(conn: sa.Connection, lease: LeaseRecord, *, ends_cycle: bool) -> None:
    """First statement of every write of a leader. Raises Fenced when its lease was taken over."""
    statement = _END_CYCLE if ends_cycle else _HOLD
    _check(conn.execute(statement, _mine(lease)).rowcount, lease)


class Leases:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._make_row = database.dialect.insert(leases).on_conflict_do_nothing(index_elements=[leases.c.pool])

    async def acquire(self, pool: PoolName, holder: str, ttl_s: float) -> LeaseRecord | None:
        """The lease with a token of its own, or None while somebody else's is alive.

        Given when the lease is free, expired, or held under the same name (a holder that starts again fences itself).
        """
        assert holder
        assert ttl_s > 0

        def write(conn: sa.Connection) -> LeaseRecord | None:
            never_held = {"pool": pool, "token": 0, "holder": "", "expires_at": 0.0, "cycle": 0, "in_flight": []}
            conn.execute(self._make_row, never_held)
            now = self._clock()
            values = {"of_pool": pool, "now": now, "me": holder, "until": now + ttl_s}
            row = conn.execute(_TAKE, values).one_or_none()
            return None if row is None else _record_of(row)

        return await self._writer.run(write)

    async def renew(self, lease: LeaseRecord, ttl_s: float) -> bool:
        """Whether the lease is still this one; if so it now lasts `ttl_s` from now."""
        values = _mine(lease) | {"until": self._clock() + ttl_s}
        return await self._writer.run(lambda conn: conn.execute(_RENEW, values).rowcount == 1)

    async def release(self, lease: LeaseRecord) -> None:
        """Free the pool at once. Does nothing when the lease was taken over."""
        await self._writer.run(lambda conn: conn.execute(_RELEASE, _mine(lease)).rowcount)

    async def current(self, pool: PoolName) -> LeaseRecord | None:
        """Who leads now; None when nobody does or the lease expired."""
        row = await self._database.read(lambda conn: conn.execute(_CURRENT, {"of_pool": pool}).one_or_none())
        if row is None:
            return None
        lease = _record_of(row)
        return lease if lease.expires_at > self._clock() else None

    async def in_flight(self, pool: PoolName) -> tuple[RequestId, ...]:
        """What the last cycle handed to a worker and did not commit; for the recovery of suspects by a new leader."""
        values = {"of_pool": pool}
        ids = await self._database.read(lambda conn: conn.execute(_IN_FLIGHT, values).scalar_one_or_none())
        return tuple(RequestId(request_id) for request_id in ids or ())

    async def begin_cycle(self, lease: LeaseRecord, cycle: int, request_ids: Sequence[RequestId]) -> None:
        """Note what a worker is about to get. Raises Fenced."""
        values = _mine(lease) | {"now_cycle": cycle, "ids": list(request_ids)}
        await self._writer.run(lambda conn: _check(conn.execute(_BEGIN_CYCLE, values).rowcount, lease))


def _mine(lease: LeaseRecord) -> dict[str, object]:
    return {"of_pool": lease.pool, "my_token": lease.token}


def _check(rowcount: int, lease: LeaseRecord) -> None:
    assert rowcount in (0, 1)
    if rowcount == 0:
        raise Fenced(f"another leader took pool {lease.pool}: token {lease.token} is no longer valid")


def _record_of(row: AnyRow) -> LeaseRecord:
    pool, token, holder, expires_at, cycle = row
    return LeaseRecord(pool=PoolName(pool), token=token, holder=holder, expires_at=expires_at, cycle=cycle)
