"""Sessions: one per client process. It refuses to decide when a client counts as gone; it records heartbeats."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import SessionId, TenantId
from treadle.domain.records import SessionRecord
from treadle.domain.states import SessionState
from treadle.store.engine import Database
from treadle.store.pages import checked_page, read_page
from treadle.store.request_rows import chunks
from treadle.store.tables import AnyRow, sessions
from treadle.store.writer import Writer

_COLUMNS = (
    sessions.c.session_id,
    sessions.c.tenant_id,
    sessions.c.state,
    sessions.c.created_at,
    sessions.c.last_heartbeat_at,
    sessions.c.sdk_version,
    sessions.c.project_id,
    sessions.c.display_name,
    sessions.c.user_metadata,
)
_GET = sa.select(*_COLUMNS).where(sessions.c.session_id == sa.bindparam("id"))
_FIND_BY_KEY = sa.select(*_COLUMNS).where(
    sessions.c.tenant_id == sa.bindparam("of_tenant"), sessions.c.idempotency_key == sa.bindparam("key")
)
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
            return _record_of(conn.execute(_FIND_BY_KEY, first).one())

        return await self._writer.run(write)

    async def get(self, session_id: SessionId) -> SessionRecord | None:
        """The session, in any state."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": session_id}).one_or_none())
        return None if row is None else _record_of(row)

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

    async def list(self, tenant_id: TenantId | None, limit: int, offset: int = 0) -> tuple[list[SessionRecord], int]:
        """A page of a tenant's sessions (of all tenants for None), newest first, and how many there are."""
        query = sa.select(*_COLUMNS).order_by(sessions.c.created_at.desc(), sessions.c.session_id)
        if tenant_id is not None:
            query = query.where(sessions.c.tenant_id == tenant_id)
        page = checked_page(query, limit=limit, offset=offset)
        rows, total = await self._database.read(lambda conn: read_page(conn, page))
        return [_record_of(row) for row in rows], total


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
    }


def _record_of(row: AnyRow) -> SessionRecord:
    session_id, tenant_id, state, created_at, heartbeat_at, sdk_version, project_id, display_name, metadata = row
    return SessionRecord(
        session_id=SessionId(session_id),
        tenant_id=TenantId(tenant_id),
        state=SessionState(state),
        created_at=created_at,
        last_heartbeat_at=heartbeat_at,
        sdk_version=sdk_version,
        project_id=project_id,
        display_name=display_name,
        user_metadata=metadata,
    )
