"""All tenants by their ids, page by page, and what one of them has and does now.

A tenant is whoever has a row, or only sessions (open mode). It refuses to know who may ask. Invariant: a page begins
right behind the last tenant of the one before, whatever was added since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.backlog import Load
from treadle.domain.ids import TenantId
from treadle.domain.states import ModelState
from treadle.domain.tenants import TenantRecord, TenantStanding
from treadle.domain.usage import HOUR_S, UsageKind
from treadle.store.distinct import distinct_values
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.tables import (
    IS_ACTIVE,
    IS_QUEUED,
    IS_SAMPLE,
    AnyRow,
    checkpoints,
    keys,
    models,
    requests,
    sessions,
    tenants,
    usage_events,
)
from treadle.store.tenants import COLUMNS, record_of

_DAY_S = 24 * HOUR_S
_LIVE_STATES = tuple(state.value for state in (ModelState.CREATING, ModelState.READY))
_OF: sa.BindParameter[str] = sa.bindparam("of_tenant")
_HAS_SESSION = sa.select(sa.literal(1)).where(sessions.c.tenant_id == _OF).limit(1)
_NUM_KEYS = sa.select(sa.func.count()).where(
    keys.c.tenant_id == _OF,
    keys.c.revoked_at.is_(None),
    sa.or_(keys.c.expires_at.is_(None), keys.c.expires_at > sa.bindparam("now", type_=sa.Double)),
)
_NUM_RUNS = sa.select(sa.func.count()).where(models.c.tenant_id == _OF, models.c.state.in_(_LIVE_STATES))
_NUM_SESSIONS = sa.select(sa.func.count()).where(sessions.c.tenant_id == _OF, IS_ACTIVE)
_CHECKPOINTS = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(checkpoints.c.size_bytes), 0)).where(
    checkpoints.c.tenant_id == _OF,
    sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > sa.bindparam("now", type_=sa.Double)),
)
_QUEUED = (
    sa.select(
        IS_SAMPLE,
        sa.func.count(),
        sa.func.coalesce(sa.func.sum(requests.c.num_tokens), 0),
        sa.func.coalesce(sa.func.sum(requests.c.payload_bytes), 0),
    )
    .where(requests.c.tenant_id == _OF, IS_QUEUED)
    .group_by(IS_SAMPLE)
)
_USED = (
    sa.select(usage_events.c.kind, sa.func.sum(usage_events.c.amount))
    .where(usage_events.c.tenant_id == _OF, usage_events.c.bucket_start >= sa.bindparam("since"))
    .group_by(usage_events.c.kind)
)


@dataclass(frozen=True, slots=True)
class TenantQuery:
    """What to look for; None filters nothing. text: anywhere in the id, whatever its case (SQLite: of ASCII)."""

    limit: int
    after: str = ""
    organization: str | None = None
    text: str | None = None


class TenantListing:
    """See the module."""

    def __init__(self, *, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def find(self, query: TenantQuery) -> list[TenantRecord]:
        """The next `query.limit` tenants."""
        checked_limit(query.limit)
        statement = _page(query)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [TenantRecord(row.listed_id) if row.tenant_id is None else record_of(row) for row in rows]

    async def get(self, tenant_id: TenantId) -> TenantRecord | None:
        """A tenant that has a row or a session; None for any other id."""
        statement = sa.select(*COLUMNS).where(tenants.c.tenant_id == _OF)

        def read(conn: sa.Connection) -> TenantRecord | None:
            row = conn.execute(statement, {"of_tenant": tenant_id}).one_or_none()
            if row is not None:
                return record_of(row)
            has_session = conn.execute(_HAS_SESSION, {"of_tenant": tenant_id}).first() is not None
            return TenantRecord(tenant_id) if has_session else None

        return await self._database.read(read)

    async def standing(self, tenant_id: TenantId) -> TenantStanding:
        """What it has and does now."""
        now = self._clock()
        of_now = {"of_tenant": tenant_id, "now": now}
        of_today = {"of_tenant": tenant_id, "since": int(now // _DAY_S) * _DAY_S}
        of_tenant = {"of_tenant": tenant_id}

        def read(conn: sa.Connection) -> TenantStanding:
            num_checkpoints, checkpoint_bytes = conn.execute(_CHECKPOINTS, of_now).one()
            return TenantStanding(
                num_keys=conn.execute(_NUM_KEYS, of_now).scalar_one(),
                num_live_runs=conn.execute(_NUM_RUNS, of_tenant).scalar_one(),
                num_active_sessions=conn.execute(_NUM_SESSIONS, of_tenant).scalar_one(),
                num_checkpoints=num_checkpoints,
                checkpoint_bytes=int(checkpoint_bytes),
                queued={bool(row[0]): _load_of(row) for row in conn.execute(_QUEUED, of_tenant)},
                usage_today={UsageKind(kind): amount for kind, amount in conn.execute(_USED, of_today)},
            )

        return await self._database.read(read)


def _page(query: TenantQuery) -> sa.Select[tuple[Any, ...]]:
    # All by the database's own order of texts, which need not be Python's.
    parts = [sa.select(_with_row(query).subquery().c.tenant_id)]
    if query.organization is None:
        parts.append(sa.select(_with_sessions(query).subquery().c.tenant_id))
    listed = sa.union(*parts).subquery()
    return (
        sa.select(listed.c.tenant_id.label("listed_id"), *COLUMNS)
        .outerjoin_from(listed, tenants, tenants.c.tenant_id == listed.c.tenant_id)
        .order_by(listed.c.tenant_id)
        .limit(query.limit)
    )


def _with_row(query: TenantQuery) -> sa.Select[tuple[str]]:
    statement = (
        sa.select(tenants.c.tenant_id)
        .where(tenants.c.tenant_id > query.after)
        .order_by(tenants.c.tenant_id)
        .limit(query.limit)
    )
    if query.organization is not None:
        statement = statement.where(tenants.c.organization == query.organization)
    if query.text is not None:
        statement = statement.where(tenants.c.tenant_id.icontains(query.text, autoescape=True))
    return statement


def _with_sessions(query: TenantQuery) -> sa.Select[tuple[str]]:
    """The next tenants that have sessions."""
    is_behind = sessions.c.tenant_id > query.after
    if query.text is not None:
        # Few fit, so all have to be looked at, and to read an index costs a fiftieth of a step in it.
        fits = sessions.c.tenant_id.icontains(query.text, autoescape=True)
        statement = sa.select(sessions.c.tenant_id).where(is_behind, fits).distinct()
        return statement.order_by(sessions.c.tenant_id).limit(query.limit)
    steps = distinct_values(sessions.c.tenant_id, is_behind, limit=query.limit)
    return (
        sa.select(steps.c.value.label("tenant_id"))
        .where(steps.c.value.is_not(None))
        .order_by(steps.c.value)
        .limit(query.limit)
    )


def _load_of(row: AnyRow) -> Load:
    _, num_ops, num_tokens, num_bytes = row
    return Load(int(num_ops), int(num_tokens), int(num_bytes))
