"""Answers about who calls, what was used and what was done, as models. See answers.py."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from treadle.wire.answers import Answer


class AuthTokenAnswer(Answer):
    jwt: str
    """HS256, for an hour; its claims: sub, org_id, iat, exp. Send it as X-API-Key."""


class OrgDetails(Answer):
    name: str


class UserDetails(Answer):
    email: str
    """The user's name: this server knows no addresses."""


class KeyDetails(Answer):
    org_details: OrgDetails
    user_details: UserDetails


class ApiKeyAnswer(Answer):
    """What may be known of the key that was sent."""

    key_id: int
    """0 in open mode, where keys are not created."""
    name: str
    note: str
    details: KeyDetails


class AuditEntry(Answer):
    """Something that was done to what outlives a request."""

    timestamp: datetime
    event: str
    """`<resource>_<action>`."""
    event_details: dict[str, Any]
    model_id: str | None
    tinker_path: str | None
    purpose: str | None


class AuditAnswer(Answer):
    entries: list[AuditEntry]
    """By time."""


class TrainingUsage(Answer):
    type: Literal["training"]
    token_count: int
    """Tokens of passes, forward-only ones included."""


class PrefillUsage(Answer):
    type: Literal["sampling_prefill"]
    cached: bool
    """Whether the tokens of the prompts were found in the prefix cache."""
    token_count: int


class SampledUsage(Answer):
    type: Literal["sampling_sample"]
    token_count: int


class CheckpointUsage(Answer):
    type: Literal["checkpoint"]
    count: int
    """Named saves."""


class StorageUsage(Answer):
    type: Literal["storage"]
    free: bool
    gigabyte_hours: float
    """Of 10^9 bytes."""


class UsageEvent(Answer):
    """What one session used of one kind in one hour. Costs are not computed here, and null."""

    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None
    user_id: str
    user_name: str
    session_id: str | None
    project_id: str | None
    estimated_cost_usd: float | None
    effective_rate_usd_per_million_tokens: float | None
    effective_rate_usd_per_gigabyte_month: float | None
    event_info: Annotated[
        TrainingUsage | PrefillUsage | SampledUsage | CheckpointUsage | StorageUsage, Field(discriminator="type")
    ]


class UsageSession(Answer):
    user_metadata: dict[str, str]


class UsageAnswer(Answer):
    data: list[UsageEvent]
    """By hour, then by amount, largest first."""
    sessions: dict[str, UsageSession]
    """Of every session that `data` names."""
    cost_data_through: datetime | None


class StorageItem(Answer):
    """What one project's checkpoints take now."""

    project_id: str
    org_user_urn: str
    user_email: str | None
    user_name: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    """Of 10^9 bytes."""
    estimated_monthly_cost_usd: float | None


class StorageAnswer(Answer):
    effective_rate_usd_per_gigabyte_month: float | None
    data: list[StorageItem]
