"""Runs of all tenants as operators look at them: pages, newest first, and what one run has waiting and to replay.

It refuses to know who may ask. Invariant: a page costs as much as it has rows, wherever it begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from treadle.domain.backlog import Load
from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.records import ModelRecord
from treadle.domain.states import ModelState
from treadle.store.engine import Database
from treadle.store.models import Models
from treadle.store.pages import checked_limit
from treadle.store.tables import IS_QUEUED, models, requests, run_log

_r = requests.c
# Behind its next_seq_id nothing of a run waits: what is older needs no look.
_WAITING = sa.select(
    sa.func.count(),
    sa.func.coalesce(sa.func.sum(_r.num_tokens), 0),
    sa.func.coalesce(sa.func.sum(_r.payload_bytes), 0),
    sa.func.min(_r.created_at),
).where(_r.model_id == sa.bindparam("of_model"), _r.seq_id >= sa.bindparam("from_seq"), IS_QUEUED)
_REPLAYED = (OpKind.FORWARD_BACKWARD.value, OpKind.OPTIM_STEP.value)
_REPLAY = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(run_log.c.run_s), 0.0)).where(
    run_log.c.model_id == sa.bindparam("of_model"),
    run_log.c.seq_id > sa.bindparam("after_seq"),
    run_log.c.kind.in_(_REPLAYED),
)


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs; None: any."""

    tenant_id: TenantId | None = None
    pool: PoolName | None = None
    state: ModelState | None = None


@dataclass(frozen=True, slots=True)
class RunWork:
    """What one run has to do.

    waiting: queued requests, and when the oldest of them came. num_replayed, replay_s: ops behind its newest snapshot,
    and how long they took the worker: what its loss would cost.
    """

    waiting: Load
    oldest_at: float | None
    num_replayed: int
    replay_s: float


class RunSearch:
    """See the module."""

    def __init__(self, *, database: Database, models: Models) -> None:
        self._database = database
        self._models = models

    async def page(
        self, wanted: RunFilter, *, limit: int, after: tuple[float, ModelId] | None = None
    ) -> list[ModelRecord]:
        """The next `limit` runs, newest first, behind the one with this created_at and id."""
        m = models.c
        query = sa.select(m.model_id).order_by(m.created_at.desc(), m.model_id.desc()).limit(checked_limit(limit))
        if wanted.tenant_id is not None:
            query = query.where(m.tenant_id == wanted.tenant_id)
        if wanted.pool is not None:
            query = query.where(m.pool == wanted.pool)
        if wanted.state is not None:
            query = query.where(m.state == wanted.state.value)
        if after is not None:
            query = query.where(sa.tuple_(m.created_at, m.model_id) < sa.tuple_(*after))
        ids = await self._database.read(lambda conn: conn.execute(query).scalars().all())
        found = {record.model_id: record for record in await self._models.of_ids([ModelId(id_) for id_ in ids])}
        return [found[ModelId(id_)] for id_ in ids if ModelId(id_) in found]

    async def work(self, run: ModelRecord, *, snapshot_seq_id: int) -> RunWork:
        """What a run has waiting, and to replay behind a snapshot."""
        waiting_of = {"of_model": run.model_id, "from_seq": run.next_seq_id}
        replay_of = {"of_model": run.model_id, "after_seq": snapshot_seq_id}

        def read(conn: sa.Connection) -> RunWork:
            num_ops, num_tokens, num_bytes, oldest_at = conn.execute(_WAITING, waiting_of).one()
            num_replayed, replay_s = conn.execute(_REPLAY, replay_of).one()
            load = Load(num_ops=num_ops, num_tokens=int(num_tokens), num_bytes=int(num_bytes))
            return RunWork(load, oldest_at, num_replayed, replay_s)

        return await self._database.read(read)
