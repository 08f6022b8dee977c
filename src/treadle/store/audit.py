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
from treadle.store.tables import audit_log

EventType = Literal["checkpoints", "projects", "teams", "organizations"]


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event. tenant_id: who did it. details: JSON, for the reader. purpose: why, where a client said so."""

    tenant_id: TenantId
    created_at: float
    event_type: EventType
    event: str
    details: Mapping[str, Any] = field(default_factory=dict)
    model_id: ModelId | None = None
    tinker_path: str | None = None
    purpose: str | None = None


def add(conn: sa.Connection, events: Sequence[AuditEvent]) -> None:
    """Note these events inside a write transaction."""
    if events:
        conn.execute(audit_log.insert(), [_row_of(event) for event in events])


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
    }
