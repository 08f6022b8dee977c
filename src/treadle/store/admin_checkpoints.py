"""Checkpoints of all tenants for operators: listed page by page, deleted, taken back from the public.

It refuses to touch blobs. Invariants: a checkpoint whose time is up is as good as gone; what an operator changes is in
the audit log, with who owned it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import TenantId, TinkerPath
from treadle.domain.records import CheckpointRecord
from treadle.store.audit import Author, add_change
from treadle.store.checkpoints import record_of
from treadle.store.ended_checkpoints import end_checkpoints
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.tables import IS_PUBLIC, checkpoints
from treadle.store.writer import Writer

_c = checkpoints.c
_IS_LIVE = sa.or_(_c.expires_at.is_(None), _c.expires_at > sa.bindparam("now", type_=sa.Double))
_FIND = sa.select(*_c).where(_c.tinker_path == sa.bindparam("path"), _IS_LIVE).with_for_update()
_DELETE = checkpoints.delete().where(_c.tinker_path == sa.bindparam("path"))
_UNPUBLISH = checkpoints.update().where(_c.tinker_path == sa.bindparam("path")).values(public=False)


class AdminCheckpoints:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock

    async def list(
        self,
        limit: int,
        *,
        tenant_id: TenantId | None = None,
        is_public: bool | None = None,
        behind: tuple[float, str] | None = None,
    ) -> list[CheckpointRecord]:
        """The next `limit` checkpoints, newest first. behind: time and path of the last one of the page before."""
        statement = (
            sa.select(*_c)
            .where(_IS_LIVE)
            .order_by(_c.created_at.desc(), _c.tinker_path.desc())
            .limit(checked_limit(limit))
            .params(now=self._clock())
        )
        if tenant_id is not None:
            statement = statement.where(_c.tenant_id == tenant_id)
        if is_public is not None:
            statement = statement.where(IS_PUBLIC if is_public else _c.public.is_(sa.false()))
        if behind is not None:
            created_at, path = behind
            # The first condition is what an index can follow.
            statement = statement.where(
                _c.created_at <= created_at, sa.or_(_c.created_at < created_at, _c.tinker_path < path)
            )
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [record_of(row) for row in rows]

    async def delete(self, path: TinkerPath, *, author: Author) -> bool:
        """Whether there was such a checkpoint. Its files go when no copy, run, queued load or sampler needs them."""

        def write(conn: sa.Connection) -> bool:
            record = self._find(conn, path)
            if record is None:
                return False
            end_checkpoints(conn, _DELETE, {"path": str(path)}, now=self._clock())
            self._note(conn, author, "checkpoint.deleted", record, after=None)
            return True

        return await self._writer.run(write)

    async def unpublish(self, path: TinkerPath, *, author: Author) -> bool:
        """Whether there is such a checkpoint; from now on it is its owner's alone. Idempotent."""

        def write(conn: sa.Connection) -> bool:
            record = self._find(conn, path)
            if record is None:
                return False
            if record.public:
                conn.execute(_UNPUBLISH, {"path": str(path)})
                self._note(conn, author, "checkpoint.unpublished", record, after=_shown(record) | {"public": False})
            return True

        return await self._writer.run(write)

    def _find(self, conn: sa.Connection, path: TinkerPath) -> CheckpointRecord | None:
        row = conn.execute(_FIND, {"path": str(path), "now": self._clock()}).one_or_none()
        return None if row is None else record_of(row)

    def _note(
        self, conn: sa.Connection, author: Author, event: str, record: CheckpointRecord, *, after: dict[str, Any] | None
    ) -> None:
        subject = f"checkpoint:{record.tinker_path}"
        add_change(conn, author, event, subject, before=_shown(record), after=after, now=self._clock())


def _shown(record: CheckpointRecord) -> dict[str, Any]:
    """A checkpoint for the audit log."""
    return {"tenant_id": record.tenant_id, "size_bytes": record.size_bytes, "public": record.public}
