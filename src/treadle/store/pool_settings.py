"""What operators decided about pools: rows over the servers' settings, read as one picture with a version.

Every change is one transaction with its row of the audit log. It refuses to know how a pool is served, and whether a
source can be loaded. Invariant: while runs of a pool are stored, its name stands for one source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sqlalchemy as sa

from treadle.domain.ids import PoolName
from treadle.domain.limits import MAX_ADDED_POOLS, MAX_WORKERS_PER_POOL
from treadle.domain.pool_decisions import PoolDecision, PoolDecisions, PoolState
from treadle.errors import InvalidRequest
from treadle.store.audit import Author, add_change
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.tables import AnyRow, control, models, pool_settings
from treadle.store.writer import Writer

# The row of `control` that counts the changes.
POOLS = "pools"

_VERSION = sa.select(control.c.version).where(control.c.name == POOLS)
_BUMP = (
    control.update()
    .where(control.c.name == POOLS)
    .values(version=control.c.version + 1, updated_at=sa.bindparam("now"))
)
_FIRST = control.insert().values(name=POOLS, version=1)
_ALL = sa.select(*pool_settings.c).order_by(pool_settings.c.pool)
_ONE = sa.select(*pool_settings.c).where(pool_settings.c.pool == sa.bindparam("of_pool"))
_NUM_ADDED = sa.select(sa.func.count()).where(
    pool_settings.c.source.is_not(None), pool_settings.c.state != PoolState.REMOVED.value
)
# Also runs that are over: their checkpoints are loaded under the name.
_ANY_RUN = sa.select(sa.literal(1)).where(models.c.pool == sa.bindparam("of_pool")).limit(1)

_EVENTS = {
    PoolState.SERVING: "pool.resumed",
    PoolState.PAUSED: "pool.paused",
    PoolState.DRAINING: "pool.draining",
    PoolState.REMOVED: "pool.removed",
}


class PoolSettings:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, events: Events, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._clock = clock
        insert = database.dialect.insert(pool_settings)
        names = ("source", "revision", "state", "reason", "updated_at", "num_workers", "num_samplers")
        self._put = insert.on_conflict_do_update(
            index_elements=[pool_settings.c.pool], set_={name: insert.excluded[name] for name in names}
        )

    async def version(self) -> int:
        """Of what `read` would return; 0 when nothing was decided yet."""
        return await self._database.read(lambda conn: conn.execute(_VERSION).scalar_one_or_none()) or 0

    async def read(self) -> PoolDecisions:
        """The newest picture. Its version is read first, so a change on the way is read again at the next look."""

        def read(conn: sa.Connection) -> PoolDecisions:
            version = conn.execute(_VERSION).scalar_one_or_none() or 0
            decisions = [_decision_of(row) for row in conn.execute(_ALL)]
            return PoolDecisions(version, {decision.pool: decision for decision in decisions})

        return await self._database.read(read)

    async def add(self, author: Author, pool: PoolName, source: str | None, revision: str | None) -> None:
        """Have the pool served from `source`; None: as the servers' settings, or the decision before, say.

        Idempotent. Raises InvalidRequest while it is served from another source, while runs of another source are
        stored under the name, and when there are too many.
        """

        def write(conn: sa.Connection) -> None:
            before = _find(conn, pool)
            if before is None and source is None:
                return  # one of the settings, and nothing keeps it from being served
            after = _added(conn, before, pool, source, revision)
            if after is not None:
                self._write(conn, author, "pool.added", before, after)

        await self._writer.run(write, after_commit=lambda _: self._events.announce_pool(pool))

    async def decide(self, author: Author, pool: PoolName, state: PoolState, reason: str = "") -> None:
        """Give a pool that is served this state. Idempotent. Raises InvalidRequest for one that was removed."""

        def write(conn: sa.Connection) -> None:
            before = _find(conn, pool)
            is_removed = before is not None and before.state is PoolState.REMOVED
            if is_removed and state is not PoolState.REMOVED:
                raise InvalidRequest(f"pool {pool} was removed; add it again (POST /admin/v1/pools) first")
            now_state = PoolState.SERVING if before is None else before.state
            now_reason = "" if before is None else before.reason
            if (now_state, now_reason) == (state, reason) or (is_removed and not reason):
                return
            after = replace(before or PoolDecision(pool, state), state=state, reason=reason)
            self._write(conn, author, _EVENTS[state], before, after)

        await self._writer.run(write, after_commit=lambda _: self._events.announce_pool(pool))

    async def scale(self, author: Author, pool: PoolName, *, num_workers: int | None, num_samplers: int | None) -> None:
        """Want so many workers of a pool, None: as the servers' settings say. Idempotent.

        Raises InvalidRequest for a pool that was removed.
        """
        assert num_workers is None or 1 <= num_workers <= MAX_WORKERS_PER_POOL, num_workers
        assert num_samplers is None or 0 <= num_samplers <= MAX_WORKERS_PER_POOL, num_samplers

        def write(conn: sa.Connection) -> None:
            before = _find(conn, pool)
            if before is not None and before.state is PoolState.REMOVED:
                raise InvalidRequest(f"pool {pool} was removed; add it again (POST /admin/v1/pools) first")
            now = before or PoolDecision(pool, PoolState.SERVING)
            after = replace(now, num_workers=num_workers, num_samplers=num_samplers)
            if after != now:
                self._write(conn, author, "pool.scaled", before, after)

        await self._writer.run(write, after_commit=lambda _: self._events.announce_pool(pool))

    def _write(
        self, conn: sa.Connection, author: Author, event: str, before: PoolDecision | None, after: PoolDecision
    ) -> None:
        now = self._clock()
        conn.execute(self._put, _row_of(after) | {"updated_at": now})
        if conn.execute(_BUMP, {"now": now}).rowcount == 0:
            conn.execute(_FIRST, {"updated_at": now})
        told_before = None if before is None else _told(before)
        add_change(conn, author, event, f"pool:{after.pool}", before=told_before, after=_told(after), now=now)


def _added(
    conn: sa.Connection, before: PoolDecision | None, pool: PoolName, source: str | None, revision: str | None
) -> PoolDecision | None:
    """The decision that adds the pool, None when it is there as asked. Raises InvalidRequest."""
    if before is not None:
        is_same = source is None or (source, revision) == (before.source, before.revision)
        if is_same and before.state is not PoolState.REMOVED:
            return None
        if is_same:
            source, revision = before.source, before.revision
        elif before.state is not PoolState.REMOVED:
            served = _source_words(before)
            raise InvalidRequest(
                f"pool {pool} is served already, from {served}; choose another name, or remove it first"
            )
        elif conn.execute(_ANY_RUN, {"of_pool": pool}).one_or_none() is not None:
            raise InvalidRequest(
                f"pool {pool} was served from {_source_words(before)}, and runs of that are stored under its name: "
                "leave out the source to serve it again, or choose another name"
            )
    if source is not None and conn.execute(_NUM_ADDED).scalar_one() >= MAX_ADDED_POOLS:
        raise InvalidRequest(f"{MAX_ADDED_POOLS} pools were added already, which is the limit; remove one first")
    known = before or PoolDecision(pool, PoolState.SERVING)
    return replace(known, state=PoolState.SERVING, source=source, revision=revision, reason="")


def _source_words(decision: PoolDecision) -> str:
    if decision.source is None:
        return "what the servers' settings name"
    return decision.source + ("" if decision.revision is None else f" at {decision.revision}")


def _find(conn: sa.Connection, pool: PoolName) -> PoolDecision | None:
    row = conn.execute(_ONE, {"of_pool": pool}).one_or_none()
    return None if row is None else _decision_of(row)


def _told(decision: PoolDecision) -> dict[str, object]:
    """What the audit log says of it."""
    return {
        "state": decision.state.value,
        "source": decision.source,
        "revision": decision.revision,
        "reason": decision.reason,
        "num_workers": decision.num_workers,
        "num_samplers": decision.num_samplers,
    }


def _row_of(decision: PoolDecision) -> dict[str, object]:
    return {
        "pool": decision.pool,
        "source": decision.source,
        "revision": decision.revision,
        "state": decision.state.value,
        "reason": decision.reason or None,
        "num_workers": decision.num_workers,
        "num_samplers": decision.num_samplers,
    }


def _decision_of(row: AnyRow) -> PoolDecision:
    return PoolDecision(
        pool=PoolName(row.pool),
        state=PoolState(row.state),
        source=row.source,
        revision=row.revision,
        reason=row.reason or "",
        decided_at=row.updated_at,
        num_workers=row.num_workers,
        num_samplers=row.num_samplers,
    )
