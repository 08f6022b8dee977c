"""What waits, added up: for admission, for metrics, and for a user who asks where a request stands.

It refuses to know limits. Reading all of it costs time in proportion to what is queued (about a millisecond per
thousand rows), so callers read it now and then, never per request.
"""

from __future__ import annotations

import sqlalchemy as sa

from treadle.domain.backlog import Load, Place, TenantBacklog
from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.limits import MAX_SEQ_ID_LEAD
from treadle.domain.records import RequestRecord
from treadle.store.engine import Database
from treadle.store.tables import IS_IN_LINE, IS_QUEUED, IS_SAMPLE, AnyRow, models, requests

_r = requests.c
_LOAD = (
    sa.func.count(),
    sa.func.coalesce(sa.func.sum(_r.num_tokens), 0),
    sa.func.coalesce(sa.func.sum(_r.payload_bytes), 0),
)
BACKLOG = (
    sa.select(_r.tenant_id, _r.pool, IS_SAMPLE, sa.func.min(_r.created_at), *_LOAD)
    .where(IS_QUEUED)
    .group_by(_r.tenant_id, _r.pool, IS_SAMPLE)
)
AHEAD_IN_RUN = sa.select(*_LOAD).where(
    _r.pool == sa.bindparam("of_pool"),
    _r.model_id == sa.bindparam("of_model"),
    _r.seq_id < sa.bindparam("before"),
    IS_IN_LINE,
)
AHEAD_OF_SAMPLE = sa.select(*_LOAD).where(
    _r.pool == sa.bindparam("of_pool"),
    _r.tenant_id == sa.bindparam("of_tenant"),
    _r.row_id < sa.select(_r.row_id).where(_r.request_id == sa.bindparam("of_request")).scalar_subquery(),
    IS_QUEUED,
    IS_SAMPLE,
)
_NEXT_SEQ_ID = sa.select(models.c.next_seq_id).where(models.c.model_id == sa.bindparam("of_model"))
_SEQ_IDS = (
    sa.select(_r.seq_id)
    .where(
        _r.model_id == sa.bindparam("of_model"),
        _r.seq_id >= sa.bindparam("first"),
        _r.seq_id < sa.bindparam("before"),
    )
    .order_by(_r.seq_id)
    .limit(MAX_SEQ_ID_LEAD)
)


class BacklogReads:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self) -> list[TenantBacklog]:
        """What every tenant has waiting in every pool; tenants without anything queued are left out."""
        rows = await self._database.read(lambda conn: conn.execute(BACKLOG).all())
        return [
            TenantBacklog(
                pool=PoolName(pool),
                tenant_id=TenantId(tenant_id),
                is_sample=bool(is_sample),
                load=Load(int(num_ops), int(num_tokens), int(num_bytes)),
                oldest_at=oldest_at,
            )
            for tenant_id, pool, is_sample, oldest_at, num_ops, num_tokens, num_bytes in rows
        ]

    async def place_of(self, row: RequestRecord) -> Place:
        """Where a queued request stands in its own line: its run's, or for a sample its tenant's."""
        if row.model_id is None:
            values = {"of_pool": row.pool, "of_tenant": row.tenant_id, "of_request": row.request_id}
            ahead = await self._database.read(lambda conn: conn.execute(AHEAD_OF_SAMPLE, values).one())
            return Place(_load_of(ahead))
        model_id = row.model_id

        def read(conn: sa.Connection) -> Place:
            values = {"of_pool": row.pool, "of_model": model_id, "before": row.seq_id}
            ahead = conn.execute(AHEAD_IN_RUN, values).one()
            return Place(_load_of(ahead), _first_missing(conn, model_id, row.seq_id))

        return await self._database.read(read)

    async def first_missing(self, model_id: ModelId, before: int) -> int | None:
        """The first sequence number in front of `before` that the run still needs and that never came, if any."""
        return await self._database.read(lambda conn: _first_missing(conn, model_id, before))


def _first_missing(conn: sa.Connection, model_id: ModelId, before: int) -> int | None:
    expected: int = conn.execute(_NEXT_SEQ_ID, {"of_model": model_id}).scalar_one()
    for seq_id in conn.execute(_SEQ_IDS, {"of_model": model_id, "first": expected, "before": before}).scalars():
        if seq_id != expected:
            return expected
        expected += 1
    return expected if expected < before else None


def _load_of(row: AnyRow) -> Load:
    num_ops, num_tokens, num_bytes = row
    return Load(int(num_ops), int(num_tokens), int(num_bytes))
