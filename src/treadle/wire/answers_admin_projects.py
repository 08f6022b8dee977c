"""Answers about shared projects for operators, as models; see answers.py."""

from __future__ import annotations

from datetime import datetime

from treadle.wire.answers import Answer


class AdminProjectSummary(Answer):
    project_id: str
    name: str
    tenant_id: str
    """Its owner."""
    created_at: datetime
    num_members: int
    """Its owner included."""


class AdminProjectMember(Answer):
    tenant_id: str
    added_at: datetime
    is_effective: bool
    """False: it is not in the owner's organization now, so nothing is shared with it, nor anything of its."""


class AdminProjectAnswer(AdminProjectSummary):
    """One project with its members, in the order in which they came."""

    members: list[AdminProjectMember]


class AdminProjectsAnswer(Answer):
    projects: list[AdminProjectSummary]
    next: str | None
    """Send it as `after`; null behind the last page."""
