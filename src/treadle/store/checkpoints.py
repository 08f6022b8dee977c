"""Checkpoints: names of immutable blobs. They are published by the scheduler's commits (cycles.py).

It refuses to touch blobs. Invariants: a checkpoint whose time is up is as good as gone, even before a sweep; what an
owner changes is in the audit log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, TenantId, TinkerPath
from treadle.domain.limits import MAX_UNPAGED_ROWS
from treadle.domain.records import CheckpointRecord
from treadle.store import audit
from treadle.store.audit import AuditEvent
from treadle.store.dialect import Dialect
from treadle.store.ended_checkpoints import ENDED, end_checkpoints, note_ended
from treadle.store.engine import Database
from treadle.store.lora_json import lora_from_json, lora_to_json
from treadle.store.pages import checked_limit, checked_page, read_page
from treadle.store.tables import AnyRow, checkpoints
from treadle.store.writer import Writer

_LIVE = sa.select(*checkpoints.c).where(
    sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > sa.bindparam("now", type_=sa.Double))
)
_NEWEST_FIRST = (checkpoints.c.created_at.desc(), checkpoints.c.tinker_path)
_FIND = _LIVE.where(checkpoints.c.tinker_path == sa.bindparam("path"))
_OF_MODEL = (
    _LIVE.where(checkpoints.c.model_id == sa.bindparam("of_model")).order_by(*_NEWEST_FIRST).limit(MAX_UNPAGED_ROWS)
)
_place = (
    sa.func.row_number()
    .over(
        partition_by=(checkpoints.c.model_id, checkpoints.c.kind),
        order_by=(checkpoints.c.created_at.desc(), checkpoints.c.seq_id.desc()),
    )
    .label("place")
)
_ranked = _LIVE.add_columns(_place).where(checkpoints.c.model_id.in_(sa.bindparam("ids", expanding=True))).subquery()
_NEWEST = sa.select(_ranked).where(_ranked.c.place == 1)
_DELETE = checkpoints.delete().where(checkpoints.c.tinker_path == sa.bindparam("path"))
_of_owner = (
    checkpoints.c.tinker_path == sa.bindparam("path"),
    checkpoints.c.tenant_id == sa.bindparam("of_tenant"),
    sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > sa.bindparam("now", type_=sa.Double)),
)
_SET_PUBLIC = checkpoints.update().where(*_of_owner).values(public=sa.bindparam("new_public"))
_SET_EXPIRY = checkpoints.update().where(*_of_owner).values(expires_at=sa.bindparam("new_expiry", type_=sa.Double))
_DELETE_OWN = checkpoints.delete().where(*_of_owner)
_REPLACED = (
    checkpoints.delete()
    .where(
        checkpoints.c.tinker_path.in_(sa.bindparam("paths", expanding=True)),
        checkpoints.c.blob_key.not_in(sa.bindparam("keys", expanding=True)),
    )
    .returning(*ENDED)
)


class CheckpointUpserts:
    """Publish checkpoints inside a write transaction; one under the same path is replaced, and ends."""

    def __init__(self, dialect: Dialect) -> None:
        insert = dialect.insert(checkpoints)
        replaced = {column.name: insert.excluded[column.name] for column in checkpoints.c if not column.primary_key}
        self._statement = insert.on_conflict_do_update(index_elements=[checkpoints.c.tinker_path], set_=replaced)

    def upsert(self, conn: sa.Connection, records: tuple[CheckpointRecord, ...]) -> None:
        """The last record of a path stays. Repeated, it changes nothing."""
        if not records:
            return
        came = {record.tinker_path: record.created_at for record in records}
        # Blobs are never written twice, so one with the same key is the same checkpoint.
        values = {"paths": list(came), "keys": [record.blob_key for record in records]}
        for row in conn.execute(_REPLACED, values).all():
            note_ended(conn, [row], now=max(came[row.tinker_path], row.created_at))
        conn.execute(self._statement, [row_of(record) for record in records])


class Checkpoints:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock

    async def find(self, tinker_path: str) -> CheckpointRecord | None:
        """The live checkpoint under a tinker:// path, whoever owns it."""
        values = {"path": tinker_path, "now": self._clock()}
        row = await self._database.read(lambda conn: conn.execute(_FIND, values).one_or_none())
        return None if row is None else record_of(row)

    async def exists(self, tinker_path: str) -> bool:
        """Whether `find` would find it."""
        return await self.find(tinker_path) is not None

    async def of_model(self, model_id: ModelId) -> list[CheckpointRecord]:
        """A run's checkpoints of all kinds, newest first, at most MAX_UNPAGED_ROWS."""
        values = {"of_model": model_id, "now": self._clock()}
        rows = await self._database.read(lambda conn: conn.execute(_OF_MODEL, values).all())
        return [record_of(row) for row in rows]

    async def list(
        self,
        tenant_id: TenantId | None,
        limit: int,
        offset: int = 0,
        *,
        kinds: Sequence[CheckpointKind] = tuple(CheckpointKind),
    ) -> tuple[list[CheckpointRecord], int]:
        """A page of a tenant's checkpoints (of all tenants for None) of some kinds, newest first, and how many."""
        query = _LIVE.order_by(*_NEWEST_FIRST).params(now=self._clock())
        if tenant_id is not None:
            query = query.where(checkpoints.c.tenant_id == tenant_id)
        if len(kinds) < len(CheckpointKind):
            query = query.where(checkpoints.c.kind.in_(kinds))
        page = checked_page(query, limit=limit, offset=offset)
        rows, total = await self._database.read(lambda conn: read_page(conn, page))
        return [record_of(row) for row in rows], total

    async def newest(self, model_ids: Sequence[ModelId]) -> dict[tuple[ModelId, CheckpointKind], CheckpointRecord]:
        """The newest checkpoint of each of these runs (a page of them) and kind, where there is one."""
        checked_limit(len(model_ids))
        values = {"ids": list(model_ids), "now": self._clock()}
        rows = await self._database.read(lambda conn: conn.execute(_NEWEST, values).all())
        records = [record_of(row) for row in rows]
        return {(record.model_id, record.kind): record for record in records}

    async def delete(self, tinker_path: str) -> bool:
        """Whether there was such a checkpoint. Its blob stays for whoever still names it, until a sweep."""
        now = self._clock()
        values = {"path": tinker_path}
        return await self._writer.run(lambda conn: len(end_checkpoints(conn, _DELETE, values, now=now)) == 1)

    async def set_public(self, path: TinkerPath, owner: TenantId, *, public: bool) -> bool:
        """Let everybody read it, or its owner alone; whether the owner has such a live checkpoint. Idempotent."""
        event = "checkpoint_publish" if public else "checkpoint_unpublish"
        return await self._change(path, owner, _SET_PUBLIC, {"new_public": public}, event=event)

    async def set_expiry(self, path: TinkerPath, owner: TenantId, *, expires_at: float | None) -> bool:
        """Have it end then, or never; whether the owner has such a live checkpoint. Idempotent."""
        values = {"new_expiry": expires_at}
        return await self._change(path, owner, _SET_EXPIRY, values, event="checkpoint_ttl_set", expires_at=expires_at)

    async def delete_own(self, path: TinkerPath, owner: TenantId) -> bool:
        """Take its name away; whether the owner had such a live checkpoint. Its blob stays as for `delete`."""
        return await self._change(path, owner, _DELETE_OWN, {}, event="checkpoint_delete")

    async def _change(
        self,
        path: TinkerPath,
        owner: TenantId,
        statement: sa.Update | sa.Delete,
        values: dict[str, Any],
        *,
        event: str,
        **details: object,
    ) -> bool:
        """Change one row, and note who did it, in one transaction."""
        now = self._clock()

        def change(conn: sa.Connection) -> bool:
            keys = {"path": str(path), "of_tenant": owner, "now": now}
            if isinstance(statement, sa.Delete):
                num_changed = len(end_checkpoints(conn, statement, keys | values, now=now))
            else:
                num_changed = conn.execute(statement, keys | values).rowcount
            if num_changed != 1:
                return False
            audit.add(conn, [event_of(event, owner, path=str(path), model_id=path.model_id, now=now, **details)])
            return True

        return await self._writer.run(change)


def event_of(
    event: str, tenant_id: TenantId, *, path: str, model_id: ModelId, now: float, **details: object
) -> AuditEvent:
    """What a tenant did to the checkpoint at `path`, for the audit log."""
    return AuditEvent(
        tenant_id=tenant_id,
        created_at=now,
        event_type="checkpoints",
        event=event,
        details={"tinker_path": path, **details},
        model_id=model_id,
        tinker_path=path,
    )


def row_of(record: CheckpointRecord) -> dict[str, Any]:
    """The columns of a checkpoint."""
    return {
        "tinker_path": record.tinker_path,
        "model_id": record.model_id,
        "tenant_id": record.tenant_id,
        "kind": record.kind.value,
        "name": record.name,
        "blob_key": record.blob_key,
        "size_bytes": record.size_bytes,
        "seq_id": record.seq_id,
        "created_at": record.created_at,
        "base_model": record.base_model,
        "lora": lora_to_json(record.lora),
        "public": record.public,
        "expires_at": record.expires_at,
        "user_metadata": dict(record.user_metadata),
        "is_encrypted": record.is_encrypted,
        "copied_from": record.copied_from,
    }


def record_of(row: AnyRow) -> CheckpointRecord:
    """A row of all columns."""
    return CheckpointRecord(
        model_id=ModelId(row.model_id),
        tenant_id=TenantId(row.tenant_id),
        kind=CheckpointKind(row.kind),
        name=row.name,
        tinker_path=row.tinker_path,
        blob_key=BlobKey(row.blob_key),
        size_bytes=row.size_bytes,
        seq_id=row.seq_id,
        created_at=row.created_at,
        base_model=row.base_model,
        lora=lora_from_json(row.lora),
        public=row.public,
        expires_at=row.expires_at,
        user_metadata=row.user_metadata,
        is_encrypted=row.is_encrypted,
        copied_from=row.copied_from,
    )
