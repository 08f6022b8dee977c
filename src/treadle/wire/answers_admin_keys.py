"""Answers to operators about API keys, as models. See answers.py."""

from __future__ import annotations

from datetime import datetime

from treadle.wire.answers import Answer


class KeyAnswer(Answer):
    """One key, without the key itself, which is stored nowhere."""

    key_id: int
    user: str
    tenant_id: str
    organization: str | None
    """Of its tenant."""
    name: str | None
    is_admin: bool
    created_at: datetime
    created_by: str | None
    """Tenant and key of whoever made it; null for the command line."""
    expires_at: datetime | None
    revoked_at: datetime | None
    is_usable: bool
    """Neither revoked nor at its end."""


class NewKeyAnswer(KeyAnswer):
    """A key that was just made."""

    key: str
    """The key itself. It is not shown again."""


class KeysAnswer(Answer):
    keys: list[KeyAnswer]
    """Newest first."""
    next: str | None
    """`before` of the next page, which may be empty; null when there is none."""
