"""Who did what to things that outlive a request: one row per event, written in the transaction that did it.

It refuses to know what an event means, and never changes a row. Invariant: an event is there when, and only when, what
it tells of was committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from treadle.domain.ids import ModelId, TenantId
from treadle.domain.limits import MAX_AUDIT_ROWS
from treadle.store.engine import Database
from treadle.store.tables import AnyRow, audit_log

# "admin": what operators decide; the others are words of the API.
EventType = Literal["checkpoints", "projects", "teams", "organizations", "admin"]


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event. tenant_id: who did it. details: JSON, for the reader. purpose: why, where a client said so.

    Of an operator's doing, actor says with which key, subject what it was done to ("tenant:user:alice", "key:3"), and
    details have "before" and "after".
    """

    tenant_id: TenantId
    created_at: float
    event_type: EventType
    event: str
    details: Mapping[str, Any] = field(default_factory=dict)
    model_id: ModelId | None = None
    tinker_path: str | None = None
    purpose: str | None = None
    actor: str | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class Author:
    """The operator behind a change: its tenant, and the tenant with the key, as the audit log names people."""

    tenant_id: TenantId
    actor: str


def add_change(
    conn: sa.Connection, author: Author, event: str, subject: str, *, before: object, after: object, now: float
) -> None:
    """Note an operator's change inside the write transaction that makes it. before, after: JSON, None for nothing."""
    details = {"before": before, "after": after}
    add(conn, [AuditEvent(author.tenant_id, now, "admin", event, details, actor=author.actor, subject=subject)])


def add(conn: sa.Connection, events: Sequence[AuditEvent]) -> None:
    """Note these events inside a write transaction."""
    if events:
        conn.execute(audit_log.insert(), [_row_of(event) for event in events])


class AuditLog:
    """Reads it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(
        self, tenant_id: TenantId, *, since: float, before: float, event_type: EventType | None = None
    ) -> list[AuditEvent] | None:
        """A tenant's events in [since, before), of one type when it is given, by time. None when there are more than
        MAX_AUDIT_ROWS."""
        a = audit_log.c
        query = (
            sa.select(*a)
            .where(a.tenant_id == tenant_id, a.created_at >= since, a.created_at < before)
            .order_by(a.created_at, a.audit_id)
            .limit(MAX_AUDIT_ROWS + 1)
        )
        if event_type is not None:
            query = query.where(a.event_type == event_type)
        rows = await self._database.read(lambda conn: conn.execute(query).all())
        return None if len(rows) > MAX_AUDIT_ROWS else [event_of(row) for row in rows]


def event_of(row: AnyRow) -> AuditEvent:
    """A row of the log."""
    return AuditEvent(
        tenant_id=TenantId(row.tenant_id),
        created_at=row.created_at,
        event_type=row.event_type,
        event=row.event,
        details=row.details,
        model_id=None if row.model_id is None else ModelId(row.model_id),
        tinker_path=row.tinker_path,
        purpose=row.purpose,
        actor=row.actor,
        subject=row.subject,
    )


def _row_of(event: AuditEvent) -> dict[str, Any]:
    return {
        "tenant_id": event.tenant_id,
        "created_at": event.created_at,
        "event_type": event.event_type,
        "event": event.event,
        "details": dict(event.details),
        "model_id": event.model_id,
        "tinker_path": event.tinker_path,
        "purpose": event.purpose,
        "actor": event.actor,
        "subject": event.subject,
    }
