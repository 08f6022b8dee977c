"""Answers to operators from the audit log, the usage and the checkpoints of all tenants. See answers.py."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from treadle.wire.answers import Answer
from treadle.wire.answers_admin_tenants import UsedAnswer


class AuditEventAnswer(Answer):
    """Something that was done."""

    audit_id: int
    time: datetime
    tenant_id: str
    """Who did it."""
    actor: str
    """Who, with the key where it is known."""
    event_type: str
    event: str
    subject: str | None
    """What an operator did it to."""
    details: dict[str, Any]
    """An operator's have `before` and `after`."""
    model_id: str | None
    tinker_path: str | None
    purpose: str | None


class AuditEventsAnswer(Answer):
    events: list[AuditEventAnswer]
    """Newest first."""
    next: str | None
    """`after` of the next page, which may be empty; null when there is none."""


class UsageSumAnswer(UsedAnswer):
    """What one group used. Of the fields that say which group, those that do not apply are null."""

    tenant_id: str | None
    user: str | None
    model_id: str | None
    """The run; "" for samples of weights that are none of the tenant's runs."""
    session_id: str | None
    project_id: str | None
    bucket_start: datetime | None
    """The beginning of the day or hour."""


class UsageSumsAnswer(Answer):
    group_by: str
    since: datetime
    before: datetime
    data: list[UsageSumAnswer]
    """By tenant and id, or by time."""
    next: str | None
    """`after` of the next page, which may be empty; null when there is none."""


class AdminCheckpointAnswer(Answer):
    """One checkpoint of any tenant."""

    tinker_path: str
    tenant_id: str
    user: str
    model_id: str
    kind: str
    name: str
    base_model: str
    lora_rank: int
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None
    public: bool
    copied_from: str | None


class AdminCheckpointsAnswer(Answer):
    checkpoints: list[AdminCheckpointAnswer]
    """Newest first."""
    next: str | None
    """`after` of the next page, which may be empty; null when there is none."""
