"""Shared projects: whose they are, who is a member, and what that lets a tenant read.

A project's owner is one of its members. It refuses to know what is done with what is shared. Invariants: whoever
changes a project is in the audit log, and so is every change in that of the project's owner; only tenants that were
here before become members; whatever ends a sharing moves `sharing_version`, in its transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import SessionId, TenantId
from treadle.domain.limits import MAX_MEMBERS_PER_PROJECT, MAX_PROJECTS_PER_TENANT
from treadle.errors import InvalidRequest, NotFound
from treadle.store import audit
from treadle.store.audit import AuditEvent, Author
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.policies import POLICIES
from treadle.store.sharing import SHARING, SharingEnd, effective_members, is_effective, shared_sessions
from treadle.store.tables import AnyRow, control, keys, project_members, projects, sessions, tenants
from treadle.store.writer import Writer

_p, _m = projects.c, project_members.c
_NEWEST_FIRST = (_p.created_at.desc(), _p.project_id.desc())
_NUM_MEMBERS = (
    sa.select(sa.func.count()).select_from(project_members).where(_m.project_id == _p.project_id).scalar_subquery()
)
_COLUMNS = (_p.project_id, _p.tenant_id, _p.name, _p.created_at)
_LIST = sa.select(*_COLUMNS, _NUM_MEMBERS.label("num_members")).order_by(*_NEWEST_FIRST)
_GET = _LIST.where(_p.project_id == sa.bindparam("id"))
# Until the end of the transaction nobody else changes the project's members.
_LOCK = sa.select(*_COLUMNS).where(_p.project_id == sa.bindparam("id")).with_for_update()
_MEMBERS = (
    sa.select(_m.tenant_id, _m.added_at, is_effective().label("is_effective"))
    .join_from(project_members, projects, _p.project_id == _m.project_id)
    .where(_m.project_id == sa.bindparam("id"))
    .order_by(_m.added_at, _m.tenant_id)
)
_members_now = effective_members()
_TAKES_PART = sa.select(sa.literal(1)).where(
    _members_now.c.project_id == sa.bindparam("id"), _members_now.c.tenant_id == sa.bindparam("of_tenant")
)
_shared = shared_sessions().subquery()
_SHARED = sa.select(sa.literal(1)).where(
    _shared.c.session_id == sa.bindparam("of_session"), _shared.c.tenant_id == sa.bindparam("of_tenant")
)
_VERSIONS = sa.select(control.c.name, control.c.version).where(control.c.name.in_([SHARING, POLICIES]))
_COUNT_OWN = sa.select(sa.func.count()).select_from(projects).where(_p.tenant_id == sa.bindparam("of_tenant"))
_COUNT_MEMBERS = sa.select(sa.func.count()).select_from(project_members).where(_m.project_id == sa.bindparam("id"))
_IS_MEMBER = sa.select(sa.literal(1)).where(
    _m.project_id == sa.bindparam("id"), _m.tenant_id == sa.bindparam("of_tenant")
)
# Tenants are known by a key, by what they made, or because somebody noted them.
_KNOWN = tuple(
    sa.select(sa.literal(1)).where(table.c.tenant_id == sa.bindparam("of_tenant")).limit(1)
    for table in (tenants, keys, sessions)
)
_ORGANIZATION = sa.select(tenants.c.organization).where(tenants.c.tenant_id == sa.bindparam("of_tenant"))
_REMOVE = project_members.delete().where(_m.project_id == sa.bindparam("id"), _m.tenant_id == sa.bindparam("of_tenant"))
_REMOVE_ALL = project_members.delete().where(_m.project_id == sa.bindparam("id"))
_DELETE = projects.delete().where(_p.project_id == sa.bindparam("id"))


@dataclass(frozen=True, slots=True)
class ProjectRecord:
    """A shared project. tenant_id: its owner."""

    project_id: str
    tenant_id: TenantId
    name: str
    created_at: float
    num_members: int


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """A member. is_effective: whether it is in the organisation of the project's owner, without which nothing is
    shared with it, nor anything of its."""

    tenant_id: TenantId
    added_at: float
    is_effective: bool


@dataclass(frozen=True, slots=True)
class ProjectPlace:
    """Behind which project a page begins."""

    created_at: float
    project_id: str


@dataclass(frozen=True, slots=True)
class ProjectPage:
    """Projects, newest first. is_last: whether there are none behind them."""

    projects: Sequence[ProjectRecord]
    is_last: bool


class Projects:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._end = SharingEnd(database.dialect)
        self._add_member = (
            database.dialect.insert(project_members)
            .on_conflict_do_nothing(index_elements=[_m.project_id, _m.tenant_id])
            .returning(_m.tenant_id)
        )

    async def create(self, project_id: str, owner: TenantId, *, name: str) -> ProjectRecord:
        """A new project with its owner in it. Raises InvalidRequest when the owner has too many."""
        now = self._clock()

        def write(conn: sa.Connection) -> ProjectRecord:
            if conn.execute(_COUNT_OWN, {"of_tenant": owner}).scalar_one() >= MAX_PROJECTS_PER_TENANT:
                raise InvalidRequest(f"you own {MAX_PROJECTS_PER_TENANT} projects, which is the limit")
            row = {"project_id": project_id, "tenant_id": owner, "name": name, "created_at": now}
            conn.execute(projects.insert(), row)
            conn.execute(self._add_member, {"project_id": project_id, "tenant_id": owner, "added_at": now})
            audit.add(conn, [_event(owner, now, "project_create", project_id, name=name)])
            return ProjectRecord(project_id, owner, name, now, num_members=1)

        return await self._writer.run(write)

    async def get(self, project_id: str) -> ProjectRecord | None:
        """The project, whoever asks."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": project_id}).one_or_none())
        return None if row is None else _record_of(row)

    async def members(self, project_id: str) -> list[MemberRecord]:
        """All members of a project in the order in which they came, at most MAX_MEMBERS_PER_PROJECT."""
        rows = await self._database.read(lambda conn: conn.execute(_MEMBERS, {"id": project_id}).all())
        return [MemberRecord(TenantId(row.tenant_id), row.added_at, bool(row.is_effective)) for row in rows]

    async def of_member(self, tenant_id: TenantId, limit: int, *, behind: ProjectPlace | None = None) -> ProjectPage:
        """The next projects that a tenant takes part in, its own and others', newest first."""
        own = sa.select(_members_now.c.project_id).where(_members_now.c.tenant_id == tenant_id)
        return await self._page(_LIST.where(_p.project_id.in_(own)), limit, behind)

    async def of_owner(self, owner: TenantId | None, limit: int, *, behind: ProjectPlace | None = None) -> ProjectPage:
        """The next projects of an owner (of all for None), newest first."""
        return await self._page(_LIST if owner is None else _LIST.where(_p.tenant_id == owner), limit, behind)

    async def takes_part(self, tenant_id: TenantId, project_id: str) -> bool:
        """Whether the project counts this tenant as a member now."""
        values = {"id": project_id, "of_tenant": tenant_id}
        return await self._database.read(lambda conn: conn.execute(_TAKES_PART, values).first() is not None)

    async def shares(self, session_id: SessionId, *, reader: TenantId) -> bool:
        """Whether a session is shared with this tenant now."""
        values = {"of_session": session_id, "of_tenant": reader}
        return await self._database.read(lambda conn: conn.execute(_SHARED, values).first() is not None)

    async def sharing_version(self) -> tuple[int, int]:
        """Moves with everything that ends a sharing: in projects, and in tenants' organisations."""
        rows = await self._database.read(lambda conn: conn.execute(_VERSIONS).all())
        versions: dict[str, int] = {row.name: row.version for row in rows}
        return versions.get(SHARING, 0), versions.get(POLICIES, 0)

    async def add_member(self, project_id: str, owner: TenantId, named: Sequence[TenantId]) -> tuple[TenantId, bool]:
        """Let the one of these tenants who can be into the owner's project; and whether it was not in it before.

        Raises NotFound when the owner has no such project; in the same words when none of the tenants was ever here and
        when they are in another organisation; InvalidRequest when several can be, or when the project is full.
        """
        now = self._clock()

        def write(conn: sa.Connection) -> tuple[TenantId, bool]:
            _locked(conn, project_id, owner=owner)
            member = _the_only([tenant_id for tenant_id in named if _may_join(conn, owner, tenant_id)])
            if member is None:
                raise NotFound(f"user {named[0][:200]!r} does not exist here, or is not in your organization")
            if _is_member(conn, project_id, member):
                return member, False
            if conn.execute(_COUNT_MEMBERS, {"id": project_id}).scalar_one() >= MAX_MEMBERS_PER_PROJECT:
                raise InvalidRequest(f"project {project_id} has {MAX_MEMBERS_PER_PROJECT} members, which is the limit")
            conn.execute(self._add_member, {"project_id": project_id, "tenant_id": member, "added_at": now})
            audit.add(conn, [_event(owner, now, "project_member_add", project_id, member=member)])
            return member, True

        return await self._writer.run(write)

    async def remove_member(self, project_id: str, named: Sequence[TenantId], *, by: TenantId) -> tuple[TenantId, bool]:
        """End the membership of the one of these tenants who is in the project, which its owner and the member itself
        may; and whether there was one.

        Raises NotFound when there is no such project of the caller's, or that it is in; InvalidRequest for the owner,
        who stays, and when several of the tenants are in it.
        """
        now = self._clock()

        def write(conn: sa.Connection) -> tuple[TenantId, bool]:
            member = _the_only([tenant_id for tenant_id in named if _is_member(conn, project_id, tenant_id)])
            project = _locked(conn, project_id, owner=None if by == member else by)
            if member is None:
                return named[0], False
            if member == project.tenant_id:
                raise InvalidRequest(f"the owner of project {project_id} cannot leave it; delete it instead")
            is_removed = conn.execute(_REMOVE, {"id": project_id, "of_tenant": member}).rowcount == 1
            if is_removed:
                self._end.note(conn, now)
                event = _event(project.tenant_id, now, "project_member_remove", project_id, member=member, by=by)
                audit.add(conn, [event])
            return member, is_removed

        return await self._writer.run(write)

    async def delete(self, project_id: str, *, owner: TenantId) -> None:
        """End the owner's project and with it the sharing; sessions keep its id. Raises NotFound."""
        now = self._clock()

        def write(conn: sa.Connection) -> None:
            _locked(conn, project_id, owner=owner)
            self._delete(conn, project_id, now)
            audit.add(conn, [_event(owner, now, "project_delete", project_id)])

        await self._writer.run(write)

    async def delete_as(self, author: Author, project_id: str) -> None:
        """The same by an operator, in the log of both. Raises NotFound."""
        now = self._clock()

        def write(conn: sa.Connection) -> None:
            project = _locked(conn, project_id, owner=None)
            members = [row.tenant_id for row in conn.execute(_MEMBERS, {"id": project_id})]
            before = {"owner": project.tenant_id, "name": project.name, "members": members}
            self._delete(conn, project_id, now)
            audit.add_change(
                conn, author, "project.deleted", f"project:{project_id}", before=before, after=None, now=now
            )
            audit.add(conn, [_event(project.tenant_id, now, "project_delete", project_id, by="an operator")])

        await self._writer.run(write)

    def _delete(self, conn: sa.Connection, project_id: str, now: float) -> None:
        self._end.note(conn, now)
        conn.execute(_REMOVE_ALL, {"id": project_id})
        conn.execute(_DELETE, {"id": project_id})

    async def _page(self, query: sa.Select[Any], limit: int, behind: ProjectPlace | None) -> ProjectPage:
        if behind is not None:
            query = query.where(
                sa.or_(
                    _p.created_at < behind.created_at,
                    sa.and_(_p.created_at == behind.created_at, _p.project_id < behind.project_id),
                )
            )
        # One more than the page, to see whether there is a next one.
        query = query.limit(checked_limit(limit) + 1)
        rows = await self._database.read(lambda conn: conn.execute(query).all())
        return ProjectPage([_record_of(row) for row in rows[:limit]], is_last=len(rows) <= limit)


def _locked(conn: sa.Connection, project_id: str, *, owner: TenantId | None) -> AnyRow:
    """The row of a project, of this owner's when it is given, until the transaction ends. Raises NotFound."""
    row = conn.execute(_LOCK, {"id": project_id}).one_or_none()
    if row is None or owner not in (None, row.tenant_id):
        raise _missing(project_id)
    return row


def _is_member(conn: sa.Connection, project_id: str, tenant_id: TenantId) -> bool:
    return conn.execute(_IS_MEMBER, {"id": project_id, "of_tenant": tenant_id}).first() is not None


def _the_only(tenant_ids: Sequence[TenantId]) -> TenantId | None:
    """Raises InvalidRequest when there are several."""
    if len(tenant_ids) > 1:
        raise InvalidRequest(f"several users have that name: say {' or '.join(map(repr, tenant_ids))}")
    return tenant_ids[0] if tenant_ids else None


def _may_join(conn: sa.Connection, owner: TenantId, member: TenantId) -> bool:
    if all(conn.execute(known, {"of_tenant": member}).first() is None for known in _KNOWN):
        return False
    organizations = [
        conn.execute(_ORGANIZATION, {"of_tenant": tenant_id}).scalar_one_or_none() for tenant_id in (owner, member)
    ]
    return organizations[0] == organizations[1]


def _missing(project_id: str) -> NotFound:
    return NotFound(f"project {project_id[:200]!r} does not exist")


def _event(tenant_id: TenantId, now: float, event: str, project_id: str, **details: object) -> AuditEvent:
    return AuditEvent(tenant_id, now, "projects", event, {"project_id": project_id, **details})


def _record_of(row: AnyRow) -> ProjectRecord:
    return ProjectRecord(row.project_id, TenantId(row.tenant_id), row.name, row.created_at, row.num_members)
