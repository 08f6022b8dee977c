"""Answers to operators about tenants and organisations, as models. See answers.py."""

from __future__ import annotations

from datetime import datetime

from treadle.wire.answers import Answer, LoadAnswer


class TenantAnswer(Answer):
    """One tenant as operators see it."""

    tenant_id: str
    user: str
    """Its name as people say it."""
    organization: str | None
    weight_class: str
    source: str | None
    """How it came here: keys, modelscope, open or admin; null when nobody noted it."""
    is_suspended: bool
    suspended_reason: str | None
    created_at: datetime | None
    """When it was first stored; null for one that only has sessions."""
    updated_at: datetime | None


class TenantsAnswer(Answer):
    tenants: list[TenantAnswer]
    """By id."""
    next: str | None
    """`after` of the next page, which may be empty; null when there is none."""


class UsedAnswer(Answer):
    """Amounts of usage."""

    training_tokens: int
    prefill_tokens: int
    """Of prompts, not found in the prefix cache."""
    cached_prefill_tokens: int
    sampled_tokens: int
    checkpoints: int
    """Named saves."""
    storage_byte_hours: float
    """Bytes of checkpoints times hours that they were there."""


class TenantQueuedAnswer(Answer):
    """What waits or runs."""

    training: LoadAnswer
    sampling: LoadAnswer


class TenantDetailAnswer(TenantAnswer):
    """One tenant, with what it has and does now."""

    num_keys: int
    """That can be used."""
    num_active_sessions: int
    num_live_runs: int
    """Made, and neither unloaded nor lost."""
    num_checkpoints: int
    checkpoint_bytes: int
    queued: TenantQueuedAnswer
    usage_today: UsedAnswer
    """Since midnight UTC."""


class OrganizationAnswer(Answer):
    name: str
    description: str
    num_tenants: int
    created_at: datetime | None
    """Null when no operator made it: its tenants came with it."""


class OrganizationsAnswer(Answer):
    organizations: list[OrganizationAnswer]
    """By name."""
    next: str | None
    """`after` of the next page, which may be empty; null when there is none."""
