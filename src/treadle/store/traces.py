"""What happened in a session, for its trace: its requests, and the run log's times of its ops.

It refuses to know how a trace is drawn. Rows of requests are forgotten after a day, lines of the run log are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import ModelId, PoolName, SamplingSessionId, SessionId
from treadle.domain.limits import MAX_TRACE_OPS
from treadle.domain.ops import OpKind
from treadle.domain.states import RequestState
from treadle.store.engine import Database
from treadle.store.tables import IS_QUEUED, IS_SAMPLE, AnyRow, models, requests, run_log, sampling_sessions

_r = requests.c
_COLUMNS = (
    _r.row_id,
    _r.kind,
    _r.state,
    _r.seq_id,
    _r.pool,
    _r.num_tokens,
    _r.model_id,
    _r.sampling_session_id,
    _r.created_at,
    _r.finished_at,
)
_session: sa.BindParameter[str] = sa.bindparam("of_session")
_newest_first = _r.row_id.desc()
# Each along an index of its own.
_OPS = (
    sa.select(*_COLUMNS)
    .join_from(models, requests, _r.model_id == models.c.model_id)
    .where(models.c.session_id == _session, _r.model_id.is_not(None))
    .order_by(_newest_first)
    .limit(MAX_TRACE_OPS + 1)
)
_FINISHED_SAMPLES = (
    sa.select(*_COLUMNS)
    .join_from(sampling_sessions, requests, _r.sampling_session_id == sampling_sessions.c.sampling_session_id)
    .where(sampling_sessions.c.session_id == _session, _r.finished_order.is_not(None))
    .order_by(_newest_first)
    .limit(MAX_TRACE_OPS + 1)
)
_QUEUED_SAMPLES = (
    sa.select(*_COLUMNS)
    .join_from(
        sampling_sessions,
        requests,
        sa.and_(
            _r.pool == sampling_sessions.c.pool,
            _r.tenant_id == sampling_sessions.c.tenant_id,
            _r.sampling_session_id == sampling_sessions.c.sampling_session_id,
        ),
    )
    .where(sampling_sessions.c.session_id == _session, IS_QUEUED, IS_SAMPLE)
    .order_by(_newest_first)
    .limit(MAX_TRACE_OPS + 1)
)
_TIMES = (
    sa.select(
        run_log.c.model_id,
        run_log.c.seq_id,
        run_log.c.kind,
        run_log.c.created_at,
        run_log.c.metrics,
        run_log.c.queued_s,
        run_log.c.run_s,
        run_log.c.cycle,
        models.c.pool,
    )
    .join_from(models, run_log)
    .where(models.c.session_id == _session)
    .order_by(run_log.c.created_at.desc(), run_log.c.model_id, run_log.c.seq_id.desc())
    .limit(MAX_TRACE_OPS + 1)
)


@dataclass(frozen=True, slots=True)
class TracedOp:
    """One op of a run, or one sample. Times are epoch seconds.

    sent_at: when the first part of it went to a worker; None where that was not noted. finished_at: None while it is
    queued. cycle: the one that completed it, of its pool.
    """

    owner: ModelId | SamplingSessionId
    pool: PoolName
    kind: OpKind
    state: RequestState
    seq_id: int
    num_tokens: int
    queued_at: float
    sent_at: float | None = None
    finished_at: float | None = None
    cycle: int | None = None


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """The newest MAX_TRACE_OPS ops of a session, oldest first. is_cut: there were more."""

    ops: tuple[TracedOp, ...]
    is_cut: bool


class Traces:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of_session(self, session_id: SessionId) -> SessionTrace:
        """What is known of a session's ops, in any state."""
        values = {"of_session": session_id}

        def read(conn: sa.Connection) -> tuple[list[AnyRow], Sequence[AnyRow]]:
            statements = (_OPS, _FINISHED_SAMPLES, _QUEUED_SAMPLES)
            rows = [row for statement in statements for row in conn.execute(statement, values)]
            return rows, conn.execute(_TIMES, values).all()

        rows, lines = await self._database.read(read)
        times = {(line.model_id, line.seq_id): line for line in lines}
        ops = [_op_of(row, times.pop((row.model_id, row.seq_id), None)) for row in rows]
        # What is left are ops whose requests are forgotten.
        ops += [_forgotten(line) for line in times.values()]
        ops.sort(key=lambda op: (op.queued_at, op.owner, op.seq_id))
        return SessionTrace(tuple(ops[-MAX_TRACE_OPS:]), is_cut=len(ops) > MAX_TRACE_OPS)


def _op_of(row: Any, line: Any | None) -> TracedOp:
    return TracedOp(
        owner=row.model_id or row.sampling_session_id,
        pool=PoolName(row.pool),
        kind=OpKind(row.kind),
        state=RequestState(row.state),
        seq_id=row.seq_id,
        num_tokens=row.num_tokens,
        queued_at=row.created_at,
        sent_at=None if line is None else line.created_at - line.run_s,
        finished_at=row.finished_at,
        cycle=None if line is None else line.cycle,
    )


def _forgotten(line: Any) -> TracedOp:
    sent_at = line.created_at - line.run_s
    return TracedOp(
        owner=ModelId(line.model_id),
        pool=PoolName(line.pool),
        kind=OpKind(line.kind),
        state=RequestState.DONE,
        seq_id=line.seq_id,
        num_tokens=int(line.metrics.get("num_tokens", 0)),
        queued_at=sent_at - line.queued_s,
        sent_at=sent_at,
        finished_at=line.created_at,
        cycle=line.cycle,
    )
