"""The run log: one line of metrics per committed op, for loss curves. Written by the scheduler's commits."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import sqlalchemy as sa

from treadle.domain.ids import ModelId
from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.domain.ops import OpKind
from treadle.domain.records import RunLogEntry
from treadle.errors import ServerError
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.tables import run_log

_READ = (
    sa.select(*run_log.c)
    .where(run_log.c.model_id == sa.bindparam("of_model"))
    .order_by(run_log.c.seq_id.desc())
    .limit(sa.bindparam("max_rows"))
)


class RunLogInserts:
    """Append to the log inside a write transaction; an op's first line stays."""

    def __init__(self, dialect: Dialect) -> None:
        self._statement = dialect.insert(run_log).on_conflict_do_nothing(
            index_elements=[run_log.c.model_id, run_log.c.seq_id]
        )

    def insert(self, conn: sa.Connection, entries: Sequence[RunLogEntry]) -> None:
        """Idempotent by (model_id, seq_id). Raises ServerError for a metric that is not finite."""
        if not entries:
            return
        for entry in entries:
            for name, value in entry.metrics.items():
                if not isfinite(value):
                    raise ServerError(f"metric {name} of {entry.model_id} at seq_id {entry.seq_id} is {value}")
        rows = [
            {
                "model_id": entry.model_id,
                "seq_id": entry.seq_id,
                "kind": entry.kind.value,
                "created_at": entry.created_at,
                "metrics": dict(entry.metrics),
                "queued_s": entry.queued_s,
                "run_s": entry.run_s,
                "cycle": entry.cycle,
            }
            for entry in entries
        ]
        conn.execute(self._statement, rows)


class RunLog:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, model_id: ModelId, limit: int = MAX_PAGE_ROWS) -> list[RunLogEntry]:
        """The newest `limit` lines of a run, in seq order."""
        values = {"of_model": model_id, "max_rows": checked_limit(limit)}
        rows = await self._database.read(lambda conn: conn.execute(_READ, values).all())
        return [
            RunLogEntry(
                model_id=ModelId(row.model_id),
                seq_id=row.seq_id,
                kind=OpKind(row.kind),
                created_at=row.created_at,
                metrics=row.metrics,
                queued_s=row.queued_s,
                run_s=row.run_s,
                cycle=row.cycle,
            )
            for row in reversed(rows)
        ]
