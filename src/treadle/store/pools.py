"""What each pool's leader reported last, for every server that shares the database and does not lead it.

It refuses to know what the facts mean. Invariant: only the leader writes (`fence`), and what a leader before said is
never taken for a pool that serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import PoolName
from treadle.domain.outcome import PoolFacts
from treadle.domain.records import LeaseRecord
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.leases import LeaseStatements, fence
from treadle.store.tables import AnyRow, leases, pools
from treadle.store.writer import Writer

_FACT_NAMES = frozenset(field.name for field in dataclasses.fields(PoolFacts))


@dataclass(frozen=True, slots=True)
class PoolReport:
    """A pool as the database shows it.

    facts: None until some leader's worker has loaded. is_ready: its leader of now said that it can run work; `reason`
    says why not. holder: who leads, "" when nobody does. expires_in_s: how long its lease lasts if it is not renewed.
    num_workers: that have loaded the model. num_deaths: of workers since this leader leads.
    """

    facts: PoolFacts | None = None
    is_ready: bool = False
    reason: str = "no server leads this pool now"
    holder: str = ""
    expires_in_s: float = 0.0
    num_workers: int = 0
    num_deaths: int = 0


class Pools:
    """See the module."""

    def __init__(
        self,
        *,
        database: Database,
        writer: Writer,
        events: Events,
        statements: LeaseStatements,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._statements = statements
        self._clock = clock
        insert = database.dialect.insert(pools)
        self._put = insert.on_conflict_do_update(
            index_elements=[pools.c.pool],
            set_={name: insert.excluded[name] for name in ("facts", "updated_at")},
        )
        self._read = (
            sa.select(
                leases.c.holder,
                leases.c.token,
                (leases.c.expires_at - statements.now).label("expires_in_s"),
                pools.c.facts,
            )
            .outerjoin_from(leases, pools, leases.c.pool == pools.c.pool)
            .where(leases.c.pool == sa.bindparam("of_pool"))
        )

    async def publish(
        self,
        lease: LeaseRecord,
        *,
        facts: PoolFacts | None,
        is_ready: bool,
        reason: str,
        num_workers: int = 0,
        num_deaths: int = 0,
    ) -> None:
        """Say how the pool is, as its leader. Raises Fenced."""
        report = {
            "token": lease.token,
            "facts": None if facts is None else dataclasses.asdict(facts),
            "is_ready": is_ready,
            "reason": reason,
            "num_workers": num_workers,
            "num_deaths": num_deaths,
        }

        def write(conn: sa.Connection) -> None:
            fence(conn, lease, ends_cycle=False)
            conn.execute(self._put, {"pool": lease.pool, "facts": report, "updated_at": self._clock()})

        await self._writer.run(write, after_commit=lambda _: self._events.announce_pool(lease.pool))

    async def report(self, pool: PoolName) -> PoolReport:
        """How the pool is, by its leader's last words and its lease."""
        values = {"of_pool": pool, **self._statements.clock_values()}
        row = await self._database.read(lambda conn: conn.execute(self._read, values).one_or_none())
        return PoolReport() if row is None else _report_of(row)


def _report_of(row: AnyRow) -> PoolReport:
    said: Mapping[str, Any] = row.facts or {}
    facts = None if said.get("facts") is None else _facts_of(said["facts"])
    if not row.holder or row.expires_in_s <= 0:
        return PoolReport(facts=facts)
    # Who took over a moment ago has said nothing yet; the facts are those of the base model.
    is_of_leader = said.get("token") == row.token
    return PoolReport(
        facts=facts,
        is_ready=is_of_leader and bool(said.get("is_ready")),
        reason=(said.get("reason") or "") if is_of_leader else "",
        holder=row.holder,
        expires_in_s=row.expires_in_s,
        num_workers=int(said.get("num_workers", 0)) if is_of_leader else 0,
        num_deaths=int(said.get("num_deaths", 0)) if is_of_leader else 0,
    )


def _facts_of(values: Mapping[str, Any]) -> PoolFacts:
    # A newer treadle may lead, and say more than this one knows.
    known = {name: value for name, value in values.items() if name in _FACT_NAMES}
    return PoolFacts(**known | {"trainable_targets": tuple(known.get("trainable_targets", ()))})
