"""Answers about shared projects as models; see answers.py."""

from __future__ import annotations

from datetime import datetime

from treadle.wire.answers import Answer


class ProjectSummary(Answer):
    project_id: str
    """What sessions name to be in it."""
    name: str
    owner: str
    """As in other answers: `tml:user:alice`."""
    is_owner: bool
    """Whether that is the caller."""
    created_at: datetime
    num_members: int
    """Its owner included."""


class ProjectMember(Answer):
    user: str
    """As in other answers: `tml:user:alice`."""
    added_at: datetime
    is_effective: bool
    """False: it is not in the owner's organization now, so nothing is shared with it, nor anything of its."""


class ProjectAnswer(ProjectSummary):
    """One project with its members, in the order in which they came."""

    members: list[ProjectMember]


class ProjectsAnswer(Answer):
    projects: list[ProjectSummary]
    next: str | None
    """Send it as `after`; null behind the last page."""


class MemberAnswer(Answer):
    """What a change of a membership came to."""

    project_id: str
    user: str
    is_member: bool
    """From now on."""
    changed: bool
    """False: it was so before."""
