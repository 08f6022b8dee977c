"""Sessions: one per client process. It refuses to decide when a client counts as gone; it records heartbeats."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import DEFAULT_PROJECT, PROJECT_PREFIX, SessionId, TenantId
from treadle.domain.records import SessionRecord
from treadle.domain.states import SessionState
from treadle.store import audit
from treadle.store.audit import AuditEvent
from treadle.store.engine import Database
from treadle.store.pages import checked_page, read_page
from treadle.store.request_rows import chunks
from treadle.store.sharing import SharingEnd, readable_session_ids
from treadle.store.tables import AnyRow, sessions
from treadle.store.writer import Writer

SESSION_COLUMNS = (
    sessions.c.session_id,
    sessions.c.tenant_id,
    sessions.c.state,
    sessions.c.created_at,
    sessions.c.last_heartbeat_at,
    sessions.c.sdk_version,
    sessions.c.project_id,
    sessions.c.display_name,
    sessions.c.user_metadata,
    sessions.c.tags,
    sessions.c.finish_reason,
    sessions.c.finish_detail,
)
session_project = sa.func.coalesce(sessions.c.project_id, sa.literal_column(f"'{DEFAULT_PROJECT}'"))
_GET = sa.select(*SESSION_COLUMNS).where(sessions.c.session_id == sa.bindparam("id"))
_FIND_BY_KEY = sa.select(*SESSION_COLUMNS).where(
    sessions.c.tenant_id == sa.bindparam("of_tenant"), sessions.c.idempotency_key == sa.bindparam("key")
)
_OF_IDS = sa.select(*SESSION_COLUMNS).where(sessions.c.session_id.in_(sa.bindparam("ids", expanding=True)))
_FINISHED = sa.select(sessions.c.session_id).where(
    sessions.c.session_id.in_(sa.bindparam("ids", expanding=True)), sessions.c.state == SessionState.FINISHED.value
)
_KNOWN = sa.select(sessions.c.session_id).where(sessions.c.session_id.in_(sa.bindparam("ids", expanding=True)))
_IS_EXPIRED = sessions.c.state == SessionState.EXPIRED.value
_TOUCH = (
    sessions.update()
    .where(sessions.c.session_id == sa.bindparam("id"))
    .values(
        last_heartbeat_at=sa.bindparam("now"),
        state=sa.case((_IS_EXPIRED, SessionState.ACTIVE.value), else_=sessions.c.state),
    )
)
_PROJECT_OF = sa.select(sessions.c.project_id).where(sessions.c.session_id == sa.bindparam("id")).with_for_update()
_ASSIGN = (
    sessions.update().where(sessions.c.session_id == sa.bindparam("id")).values(project_id=sa.bindparam("to_project"))
)
_FINISH = (
    sessions.update()
    .where(
        sessions.c.session_id == sa.bindparam("id"),
        sessions.c.state != SessionState.FINISHED.value,
    )
    .values(
        state=SessionState.FINISHED.value,
        finished_at=sa.bindparam("now"),
        finish_reason=sa.bindparam("reason"),
        finish_detail=sa.bindparam("detail"),
    )
)


class Sessions:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._sharing_end = SharingEnd(database.dialect)
        # A session without a key conflicts with none, since NULLs are distinct.
        self._insert = (
            database.dialect.insert(sessions)
            .on_conflict_do_nothing(index_elements=[sessions.c.tenant_id, sessions.c.idempotency_key])
            .returning(sessions.c.session_id)
        )

    async def create(self, record: SessionRecord, idempotency_key: str | None = None) -> SessionRecord:
        """The new session, or the first one when its tenant used the idempotency key before."""

        def write(conn: sa.Connection) -> SessionRecord:
            values = _row_of(record) | {"idempotency_key": idempotency_key}
            if conn.execute(self._insert, values).one_or_none() is not None:
                return record
            first = {"of_tenant": record.tenant_id, "key": idempotency_key}
            return record_of(conn.execute(_FIND_BY_KEY, first).one())

        return await self._writer.run(write)

    async def get(self, session_id: SessionId) -> SessionRecord | None:
        """The session, in any state."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": session_id}).one_or_none())
        return None if row is None else record_of(row)

    async def finished_among(self, session_ids: Sequence[SessionId]) -> set[SessionId]:
        """Those of these sessions that are finished."""

        def finished(conn: sa.Connection) -> set[SessionId]:
            rows = (conn.execute(_FINISHED, {"ids": chunk}).scalars() for chunk in chunks(session_ids))
            return {SessionId(session_id) for found in rows for session_id in found}

        return await self._database.read(finished)

    async def known_among(self, session_ids: Collection[SessionId]) -> set[SessionId]:
        """Those of these sessions that were ever made here: their rows stay."""

        def known(conn: sa.Connection) -> set[SessionId]:
            rows = (conn.execute(_KNOWN, {"ids": chunk}).scalars() for chunk in chunks(list(session_ids)))
            return {SessionId(session_id) for found in rows for session_id in found}

        return await self._database.read(known)

    async def touch(self, session_ids: Collection[SessionId]) -> None:
        """Record a heartbeat of these sessions now, which wakes expired ones up. Unknown sessions are ignored."""
        rows = [{"id": session_id, "now": self._clock()} for session_id in session_ids]
        if rows:
            await self._writer.run(lambda conn: conn.execute(_TOUCH, rows).rowcount)

    async def finish(self, session_id: SessionId, reason: str, detail: str | None = None) -> bool:
        """Whether this call finished the session: the first reason stays."""
        values = {"id": session_id, "now": self._clock(), "reason": reason, "detail": detail}
        return await self._writer.run(lambda conn: conn.execute(_FINISH, values).rowcount == 1)

    async def assign_project(self, session_id: SessionId, project_id: str, *, by: TenantId) -> bool:
        """Move a session into a project, and note it in the audit log of `by`; False when it was there already."""

        def write(conn: sa.Connection) -> bool:
            previous = conn.execute(_PROJECT_OF, {"id": session_id}).scalar_one()
            if previous == project_id:
                return False
            conn.execute(_ASSIGN, {"id": session_id, "to_project": project_id})
            if (previous or "").startswith(PROJECT_PREFIX):
                self._sharing_end.note(conn, self._clock())
            details = {"session_id": session_id, "project_id": project_id, "previous_project_id": previous}
            event = AuditEvent(
                tenant_id=by,
                created_at=self._clock(),
                event_type="projects",
                event="project_session_assigned",
                details=details,
            )
            audit.add(conn, [event])
            return True

        return await self._writer.run(write)

    async def list(
        self, tenant_id: TenantId | None, limit: int, offset: int = 0, *, with_shared: bool = False
    ) -> tuple[list[SessionRecord], int]:
        """A page of a tenant's sessions (of all tenants for None), newest first, and how many there are.

        with_shared: also of those that others share with the tenant.
        """
        query = sa.select(*SESSION_COLUMNS).order_by(sessions.c.created_at.desc(), sessions.c.session_id)
        if tenant_id is not None:
            is_own = sessions.c.tenant_id == tenant_id
            query = query.where(sessions.c.session_id.in_(readable_session_ids(tenant_id)) if with_shared else is_own)
        page = checked_page(query, limit=limit, offset=offset)
        rows, total = await self._database.read(lambda conn: read_page(conn, page))
        return [record_of(row) for row in rows], total

    async def of_ids(self, session_ids: Collection[SessionId]) -> dict[SessionId, SessionRecord]:
        """Those of these sessions that exist."""

        def read(conn: sa.Connection) -> dict[SessionId, SessionRecord]:
            found = (conn.execute(_OF_IDS, {"ids": chunk}) for chunk in chunks(sorted(session_ids)))
            return {SessionId(row.session_id): record_of(row) for rows in found for row in rows}

        return await self._database.read(read)


def _row_of(record: SessionRecord) -> dict[str, Any]:
    return {
        "session_id": record.session_id,
        "tenant_id": record.tenant_id,
        "state": record.state.value,
        "created_at": record.created_at,
        "last_heartbeat_at": record.last_heartbeat_at,
        "sdk_version": record.sdk_version,
        "project_id": record.project_id,
        "display_name": record.display_name,
        "user_metadata": dict(record.user_metadata),
        "tags": list(record.tags),
    }


def record_of(row: AnyRow) -> SessionRecord:
    """A row of SESSION_COLUMNS."""
    return SessionRecord(
        session_id=SessionId(row.session_id),
        tenant_id=TenantId(row.tenant_id),
        state=SessionState(row.state),
        created_at=row.created_at,
        last_heartbeat_at=row.last_heartbeat_at,
        sdk_version=row.sdk_version,
        project_id=row.project_id,
        display_name=row.display_name,
        user_metadata=row.user_metadata,
        tags=tuple(row.tags or ()),
        finish_reason=row.finish_reason,
        finish_detail=row.finish_detail,
    )
