"""What tenants share through projects, as conditions that queries are built from.

A session is shared with a tenant when it is in a shared project, and both its owner and the tenant are members of that
project who are in the organisation of the project's owner (or all three in none). It refuses to know who asks for what.
Invariant: every query about what is shared is built here, so that all of them mean the same.
"""

from __future__ import annotations

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.store.dialect import Dialect
from treadle.store.tables import control, project_members, projects, sessions, tenants

# The row of `control` whose version moves when a sharing ends. Organisations move that of policies.
SHARING = "sharing"


class SharingEnd:
    """Notes, inside the write transactions that do it, that a sharing ends."""

    def __init__(self, dialect: Dialect) -> None:
        self._move = (
            dialect.insert(control)
            .values(name=SHARING, version=1, updated_at=sa.bindparam("now"))
            .on_conflict_do_update(
                index_elements=[control.c.name],
                set_={"version": control.c.version + 1, "updated_at": sa.bindparam("now")},
            )
        )

    def note(self, conn: sa.Connection, now: float) -> None:
        conn.execute(self._move, {"now": now})


def is_effective() -> sa.ColumnElement[bool]:
    """Whether a row of project_members, joined with its project, counts: its tenant is in the owner's organisation."""
    # Not =, which PostgreSQL would make a hash of all projects' organisations for.
    return _organization_of(project_members.c.tenant_id).is_not_distinct_from(_organization_of(projects.c.tenant_id))


def effective_members() -> sa.Subquery:
    """Members (project_id, tenant_id) that count now; a project's owner is one of them."""
    return (
        sa.select(project_members.c.project_id, project_members.c.tenant_id)
        .join_from(project_members, projects, projects.c.project_id == project_members.c.project_id)
        .where(is_effective())
        .subquery()
    )


def shared_sessions() -> sa.Select[tuple[str, str]]:
    """Pairs (session_id, tenant_id of one whom it is shared with); with its own owner as well."""
    owners, readers = effective_members(), effective_members()
    return (
        sa.select(sessions.c.session_id, readers.c.tenant_id)
        .join_from(
            sessions,
            owners,
            sa.and_(owners.c.project_id == sessions.c.project_id, owners.c.tenant_id == sessions.c.tenant_id),
        )
        .join(readers, readers.c.project_id == sessions.c.project_id)
        # What the index of projects asks for, in its words.
        .where(sessions.c.project_id.is_not(None))
    )


def readable_session_ids(tenant_id: TenantId) -> sa.ScalarSelect[str]:
    """The ids of a tenant's own sessions and of those that are shared with it, for `in_`."""
    shared = shared_sessions().subquery()
    return sa.union_all(
        sa.select(sessions.c.session_id).where(sessions.c.tenant_id == tenant_id),
        sa.select(shared.c.session_id).where(shared.c.tenant_id == tenant_id),
    ).scalar_subquery()


def _organization_of(tenant_id: sa.ColumnElement[str]) -> sa.ScalarSelect[str | None]:
    """The name of a tenant's organisation, NULL for none."""
    row = tenants.alias()
    return sa.select(row.c.organization).where(row.c.tenant_id == tenant_id).scalar_subquery()
