"""Answers about quotas, to operators and to the tenants themselves, as models. See answers.py."""

from __future__ import annotations

from datetime import datetime

from treadle.wire.answers import Answer


class QuotaFactsAnswer(Answer):
    """One quota, whoever it is for."""

    quota: str
    unit: str
    meaning: str
    default: int | None
    """For tenants for whom no scope says anything; null: unlimited."""
    lowest: int
    highest: int
    """What may be set at most on this server."""


class ScopeQuotasAnswer(Answer):
    """What one scope says."""

    scope: str
    """default, organization:NAME or tenant:ID; the narrowest one that says something counts."""
    quotas: dict[str, int]


class QuotasAnswer(Answer):
    quotas: list[QuotaFactsAnswer]
    scopes: list[ScopeQuotasAnswer]
    """Those that say anything."""


class StandingAnswer(Answer):
    """One quota of one tenant."""

    quota: str
    unit: str
    limit: int | None
    """null: unlimited."""
    scope: str | None
    """Who set it: tenant:ID, organization:NAME, default, or server for the server's settings."""
    use: int | None
    """What counts against it now; null for what is judged request by request, and for a rate without a limit."""
    room_at: datetime | None
    """Of a rate that is used up: when there is room again."""


class TenantQuotasAnswer(Answer):
    tenant_id: str
    quotas: list[StandingAnswer]
