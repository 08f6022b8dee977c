"""Models: training runs. It refuses to know how training works; the scheduler's commits move a run (cycles.py).

Invariant: a run and the request that creates it come into being together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import ModelId, PoolName, RequestId, SessionId, TenantId
from treadle.domain.limits import MAX_PAGE_ROWS, MAX_UNPAGED_ROWS
from treadle.domain.records import ModelRecord, NewRequest
from treadle.domain.states import ModelState
from treadle.store.engine import Database
from treadle.store.lora_json import lora_from_json, lora_to_json
from treadle.store.pages import checked_limit, checked_page, read_page
from treadle.store.quotas import too_many_models
from treadle.store.request_rows import Added, RequestRows, checked_new, first_kinds
from treadle.store.requests import Requests
from treadle.store.sessions import session_project
from treadle.store.sharing import readable_session_ids
from treadle.store.tables import AnyRow, models, sessions
from treadle.store.writer import Writer

_COLUMNS = (
    models.c.model_id,
    models.c.session_id,
    models.c.tenant_id,
    models.c.pool,
    models.c.base_model,
    models.c.revision,
    models.c.lora,
    models.c.state,
    models.c.next_seq_id,
    models.c.created_at,
    models.c.last_request_at,
    models.c.incarnation,
    models.c.changed_seq,
    models.c.state_message,
    models.c.user_metadata,
)
_GET = sa.select(*_COLUMNS).where(models.c.model_id == sa.bindparam("id"))
_OF_SESSION = (
    sa.select(*_COLUMNS)
    .where(models.c.session_id == sa.bindparam("of_session"))
    .order_by(models.c.created_at, models.c.model_id)
    .limit(MAX_UNPAGED_ROWS)
)
_OF_IDS = (
    sa.select(*_COLUMNS).where(models.c.model_id.in_(sa.bindparam("ids", expanding=True))).order_by(models.c.model_id)
)
_OF_POOL = (
    sa.select(*_COLUMNS)
    .where(
        models.c.pool == sa.bindparam("of_pool"),
        models.c.state.in_(sa.bindparam("states", expanding=True)),
        models.c.model_id > sa.bindparam("after"),
    )
    .order_by(models.c.model_id)
    .limit(sa.bindparam("max_rows"))
)
_CREATION = sa.select(models.c.create_request_id).where(models.c.model_id == sa.bindparam("id"))
_TOUCH = models.update().where(models.c.model_id == sa.bindparam("id")).values(last_request_at=sa.bindparam("now"))


@dataclass(frozen=True, slots=True)
class _Created:
    request_id: RequestId
    added: Added
    # As it was stored; None for a replay.
    request: NewRequest | None = None


class Models:
    """See the module."""

    def __init__(
        self,
        *,
        database: Database,
        writer: Writer,
        rows: RequestRows,
        requests: Requests,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._writer = writer
        self._rows = rows
        self._requests = requests
        self._clock = clock
        self._insert = (
            database.dialect.insert(models)
            .on_conflict_do_nothing(index_elements=[models.c.model_id])
            .returning(models.c.model_id)
        )

    async def create(self, record: ModelRecord, request: NewRequest, *, max_alive: int | None = None) -> RequestId:
        """The id of the request that creates the run; a replay of the model_id gets the first one, unchanged.

        With a failure in the request the run is FAILED from the start; so it is when its tenant has `max_alive` runs
        that are alive. Raises InvalidRequest when the first one
        created the run in another way (fresh, or from a checkpoint), and ServerError when the session is unknown.
        """
        assert request.model_id == record.model_id
        checked_new(request)
        if request.failure is not None:
            record = replace(record, state=ModelState.FAILED, state_message=request.failure.message)

        def write(conn: sa.Connection) -> _Created:
            run, asked = record, request
            if max_alive is not None and asked.failure is None:
                failure = too_many_models(
                    conn, self._database.dialect, run.tenant_id, run.model_id, max_alive=max_alive
                )
                if failure is not None:
                    run = replace(run, state=ModelState.FAILED, state_message=failure.message)
                    asked = replace(asked, failure=failure)
            values = row_of(run) | {"create_request_id": request.request_id}
            if conn.execute(self._insert, values).one_or_none() is None:
                first = RequestId(conn.execute(_CREATION, {"id": record.model_id}).scalar_one())
                return _Created(first, Added(is_new=False, first_kind=first_kinds(conn, [first]).get(first)))
            added = self._rows.insert(conn, [asked], self._clock())
            assert request.request_id in added, "a request without its run"
            return _Created(request.request_id, Added(is_new=True), asked)

        def announce(created: _Created) -> None:
            if created.request is not None:
                self._requests.announce_new(created.request)

        created = await self._writer.run(write, after_commit=announce)
        created.added.checked(request)
        return created.request_id

    async def get(self, model_id: ModelId) -> ModelRecord | None:
        """The run, in any state."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": model_id}).one_or_none())
        return None if row is None else _record_of(row)

    async def of_session(self, session_id: SessionId) -> list[ModelRecord]:
        """A session's runs, oldest first, at most MAX_UNPAGED_ROWS."""
        rows = await self._database.read(lambda conn: conn.execute(_OF_SESSION, {"of_session": session_id}).all())
        return [_record_of(row) for row in rows]

    async def of_ids(self, model_ids: Sequence[ModelId]) -> list[ModelRecord]:
        """Those of these runs (a page of them) that exist, by id."""
        checked_limit(len(model_ids))
        rows = await self._database.read(lambda conn: conn.execute(_OF_IDS, {"ids": list(model_ids)}).all())
        return [_record_of(row) for row in rows]

    async def of_pool(
        self,
        pool: PoolName,
        states: Collection[ModelState],
        *,
        after: ModelId | None = None,
        limit: int = MAX_PAGE_ROWS,
    ) -> list[ModelRecord]:
        """The next `limit` of a pool's runs in one of `states`, by id, behind the run `after`."""
        values = {
            "of_pool": pool,
            "states": [state.value for state in states],
            "after": after or "",
            "max_rows": checked_limit(limit),
        }
        rows = await self._database.read(lambda conn: conn.execute(_OF_POOL, values).all())
        return [_record_of(row) for row in rows]

    async def list(
        self,
        tenant_id: TenantId | None,
        limit: int,
        offset: int = 0,
        *,
        project_id: str | None = None,
        with_shared: bool = False,
    ) -> tuple[list[ModelRecord], int]:
        """A page of a tenant's runs (of all tenants for None), newest first, and how many there are.

        with_shared: also of those that others share with the tenant.
        """
        query = sa.select(*_COLUMNS).order_by(models.c.created_at.desc(), models.c.model_id)
        if tenant_id is not None:
            is_own = models.c.tenant_id == tenant_id
            query = query.where(models.c.session_id.in_(readable_session_ids(tenant_id)) if with_shared else is_own)
        if project_id is not None:
            query = query.join_from(models, sessions).where(session_project == project_id)
        page = checked_page(query, limit=limit, offset=offset)
        rows, total = await self._database.read(lambda conn: read_page(conn, page))
        return [_record_of(row) for row in rows], total

    async def touch(self, model_id: ModelId) -> None:
        """Record a request now. Commits of the scheduler do that too, so only requests without an op need it."""
        await self._writer.run_batched(self._touch_all, model_id)

    def _touch_all(self, conn: sa.Connection, model_ids: Sequence[ModelId]) -> Sequence[None]:
        now = self._clock()
        conn.execute(_TOUCH, [{"id": model_id, "now": now} for model_id in dict.fromkeys(model_ids)])
        return [None] * len(model_ids)


def row_of(record: ModelRecord) -> dict[str, Any]:
    """The columns of a run, but for the request that creates it."""
    return {
        "model_id": record.model_id,
        "session_id": record.session_id,
        "tenant_id": record.tenant_id,
        "pool": record.pool,
        "base_model": record.base_model,
        "revision": record.revision,
        "lora": lora_to_json(record.lora),
        "state": record.state.value,
        "state_message": record.state_message,
        "next_seq_id": record.next_seq_id,
        "incarnation": record.incarnation,
        "changed_seq": record.changed_seq,
        "user_metadata": dict(record.user_metadata),
        "created_at": record.created_at,
        "last_request_at": record.last_request_at,
    }


def _record_of(row: AnyRow) -> ModelRecord:
    return ModelRecord(
        model_id=ModelId(row.model_id),
        session_id=SessionId(row.session_id),
        tenant_id=TenantId(row.tenant_id),
        pool=PoolName(row.pool),
        base_model=row.base_model,
        revision=row.revision,
        lora=lora_from_json(row.lora),
        state=ModelState(row.state),
        next_seq_id=row.next_seq_id,
        created_at=row.created_at,
        last_request_at=row.last_request_at,
        incarnation=row.incarnation,
        changed_seq=row.changed_seq,
        state_message=row.state_message,
        user_metadata=row.user_metadata,
    )
