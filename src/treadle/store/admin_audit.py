"""The audit log of all tenants, newest first, page by page, for operators.

It refuses to know what an event means. Invariant: a page begins right behind the last event of the one before, so
events that come meanwhile are on none of the later pages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.limits import MAX_AUDIT_ROWS
from treadle.store.audit import AuditEvent, EventType, event_of
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.tables import audit_log

# An operator's key, as Principal.actor writes it behind the tenant.
_WITH_KEY = re.compile(r"(.+) \(key \d+\)")
_a = audit_log.c


@dataclass(frozen=True, slots=True)
class NumberedEvent:
    """An event and its number, by which events of one moment are told apart."""

    audit_id: int
    event: AuditEvent


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """What to look for; None filters nothing. actor: a tenant, whichever of its keys, or "TENANT (key 3)".

    behind: time and number of the last event of the page before. since, before: epoch seconds, [since, before).
    """

    limit: int
    since: float | None = None
    before: float | None = None
    actor: str | None = None
    subject: str | None = None
    event: str | None = None
    behind: tuple[float, int] | None = None


class AdminAudit:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, query: AuditQuery) -> list[NumberedEvent]:
        """The next `query.limit` events, newest first."""
        checked_limit(query.limit)
        statement = (
            sa.select(*_a)
            .where(*_conditions(query))
            .order_by(_a.created_at.desc(), _a.audit_id.desc())
            .limit(query.limit)
        )
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [NumberedEvent(row.audit_id, event_of(row)) for row in rows]

    async def of_day(
        self, *, since: float, before: float, event_type: EventType | None = None
    ) -> Sequence[AuditEvent] | None:
        """All tenants' events in [since, before) by time, of one type when it is given. None when there are more than
        MAX_AUDIT_ROWS."""
        statement = (
            sa.select(*_a)
            .where(_a.created_at >= since, _a.created_at < before)
            .order_by(_a.created_at, _a.audit_id)
            .limit(MAX_AUDIT_ROWS + 1)
        )
        if event_type is not None:
            statement = statement.where(_a.event_type == event_type)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return None if len(rows) > MAX_AUDIT_ROWS else [event_of(row) for row in rows]


def _conditions(query: AuditQuery) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    wanted: tuple[tuple[sa.Column[Any], str | None], ...] = ((_a.subject, query.subject), (_a.event, query.event))
    conditions += [column == value for column, value in wanted if value is not None]
    if query.actor is not None:
        conditions += _of_actor(query.actor)
    if query.since is not None:
        conditions.append(_a.created_at >= query.since)
    if query.before is not None:
        conditions.append(_a.created_at < query.before)
    if query.behind is not None:
        created_at, audit_id = query.behind
        # The first condition is what an index can follow.
        conditions.append(_a.created_at <= created_at)
        conditions.append(sa.or_(_a.created_at < created_at, _a.audit_id < audit_id))
    return conditions


def _of_actor(actor: str) -> list[sa.ColumnElement[bool]]:
    with_key = _WITH_KEY.fullmatch(actor)
    if with_key is None:
        return [_a.tenant_id == actor]
    return [_a.tenant_id == with_key[1], _a.actor == actor]
