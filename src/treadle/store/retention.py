"""What may be forgotten, as SQL. The rules are those of docs/lifecycle.md; the sweeps decide when.

It refuses to touch blobs: it returns the keys that nobody names any more. Each call finds what is due without holding
up the writer, then changes a bounded number of rows, checking again what may have changed meanwhile. So every call is
idempotent and safe beside another server that does the same.
Invariants: a row that a restore may need stays; a key that is returned is named by no row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, RequestId, SamplingSessionId, TenantId
from treadle.domain.limits import MAX_PAGE_ROWS, MAX_ROWS_PER_SWEEP
from treadle.domain.ops import OpKind
from treadle.domain.states import ModelState, RequestState, SessionState
from treadle.store.blob_names import named_among
from treadle.store.ended_checkpoints import end_checkpoints
from treadle.store.engine import Database
from treadle.store.request_rows import chunks
from treadle.store.tables import (
    IS_ACTIVE,
    IS_IN_LINE,
    IS_QUEUED,
    IS_SAMPLE,
    AnyRow,
    checkpoints,
    models,
    payloads,
    requests,
    results,
    sampling_sessions,
    sessions,
    snapshots,
)
from treadle.store.writer import Writer

_ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_since = sa.bindparam("since", type_=sa.Double)
_before = sa.bindparam("before", type_=sa.Double)
_NO_LINE = ~sa.exists().where(requests.c.pool == models.c.pool, requests.c.model_id == models.c.model_id, IS_IN_LINE)
_NO_QUEUED_SAMPLE = sa.and_(
    ~sa.exists().where(
        requests.c.pool == sampling_sessions.c.pool,
        requests.c.tenant_id == sampling_sessions.c.tenant_id,
        requests.c.sampling_session_id == sampling_sessions.c.sampling_session_id,
        IS_QUEUED,
        IS_SAMPLE,
    ),
    # Nor one of another session that took this one's weights.
    ~sa.exists().where(requests.c.weights_id == sampling_sessions.c.sampling_session_id, IS_QUEUED),
)

# A run's last_request_at also moves when the scheduler commits something of its own, so it only narrows the search.
_IS_HEARD = sa.or_(
    sessions.c.last_heartbeat_at >= _since,
    sa.exists().where(
        models.c.session_id == sessions.c.session_id,
        models.c.last_request_at >= _since,
        requests.c.model_id == models.c.model_id,
        requests.c.created_at >= _since,
    ),
    sa.exists().where(
        sampling_sessions.c.session_id == sessions.c.session_id, sampling_sessions.c.last_used_at >= _since
    ),
)
_IS_EXPIRED = sessions.c.state == SessionState.EXPIRED.value
_SILENT = sa.select(sessions.c.session_id).where(IS_ACTIVE, ~_IS_HEARD).limit(MAX_ROWS_PER_SWEEP)
_AWAKE = sa.select(sessions.c.session_id).where(_IS_EXPIRED, _IS_HEARD).limit(MAX_ROWS_PER_SWEEP)
_EXPIRE = (
    sessions.update()
    .where(sessions.c.session_id.in_(_ids), IS_ACTIVE, sessions.c.last_heartbeat_at < _since)
    .values(state=SessionState.EXPIRED.value)
)
_REVIVE = sessions.update().where(sessions.c.session_id.in_(_ids), _IS_EXPIRED).values(state=SessionState.ACTIVE.value)

_AT_REST = (
    sa.select(models.c.model_id)
    .join_from(models, sessions)
    .where(
        models.c.model_id.in_(_ids),
        sessions.c.state.in_((SessionState.EXPIRED.value, SessionState.FINISHED.value)),
        _NO_LINE,
    )
)

_OVER = (
    sa.select(models.c.model_id)
    .join_from(models, sessions)
    .where(models.c.state == ModelState.READY.value, sessions.c.finished_at < _before, _NO_LINE)
    .limit(MAX_ROWS_PER_SWEEP)
)
_UNLOAD = (
    models.update()
    .where(models.c.model_id.in_(_ids), models.c.state == ModelState.READY.value, _NO_LINE)
    .values(state=ModelState.UNLOADED.value, state_message="its session was finished")
)


def _due_versions() -> sa.Select[Any]:
    """Unnamed versions beyond the newest of their runs, weights whose checkpoint is gone, and what finished sessions
    had."""
    s = sampling_sessions.c
    ranked = (
        sa.select(
            s.sampling_session_id,
            s.session_id,
            s.model_id,
            s.model_path,
            s.blob_key,
            s.last_used_at,
            sa.func.row_number()
            .over(
                # Snapshots do not push out what inflight clients sample.
                partition_by=(s.model_id, s.model_path.is_(None), s.kind),
                order_by=(s.created_at.desc(), s.seq_id.desc()),
            )
            .label("place"),
        )
        .where(s.is_dropped.is_(sa.false()))
        .subquery()
    )
    r = ranked.c
    is_unused = r.last_used_at < _since
    is_old_version = sa.and_(r.model_id.is_not(None), r.model_path.is_(None), r.place > sa.bindparam("keep"))
    has_no_checkpoint = sa.and_(
        r.model_path.is_not(None),
        # A checkpoint that was overwritten keeps its path, and has another blob.
        ~sa.exists().where(checkpoints.c.tinker_path == r.model_path, checkpoints.c.blob_key == r.blob_key),
    )
    return (
        sa.select(r.sampling_session_id, r.last_used_at)
        .join_from(ranked, sessions, r.session_id == sessions.c.session_id)
        .where(
            sa.or_(
                sessions.c.finished_at < _before,
                sa.and_(is_old_version, sa.or_(is_unused, ~IS_ACTIVE)),
                sa.and_(has_no_checkpoint, is_unused),
            )
        )
        .limit(MAX_ROWS_PER_SWEEP)
    )


_DUE_VERSIONS = _due_versions()
_DROP_VERSION = (
    sampling_sessions.update()
    .where(
        sampling_sessions.c.sampling_session_id == sa.bindparam("id"),
        sampling_sessions.c.last_used_at == sa.bindparam("seen_used_at", type_=sa.Double),
        sampling_sessions.c.is_dropped.is_(sa.false()),
        _NO_QUEUED_SAMPLE,
    )
    .values(is_dropped=sa.true())
    .returning(sampling_sessions.c.blob_key)
)
_DEAD_SAMPLING_SESSIONS = sa.and_(
    sampling_sessions.c.is_dropped.is_(sa.true()),
    sampling_sessions.c.last_used_at < _before,
    _NO_QUEUED_SAMPLE,
    ~sa.exists().where(
        requests.c.sampling_session_id == sampling_sessions.c.sampling_session_id,
        requests.c.finished_order.is_not(None),
    ),
)
_FORGET_SAMPLING_SESSIONS = sampling_sessions.delete().where(
    sampling_sessions.c.sampling_session_id.in_(
        sa.select(sampling_sessions.c.sampling_session_id).where(_DEAD_SAMPLING_SESSIONS).limit(MAX_ROWS_PER_SWEEP)
    )
)

_is_over = sa.and_(checkpoints.c.expires_at.is_not(None), checkpoints.c.expires_at < _before)
_DROP_CHECKPOINTS = checkpoints.delete().where(
    # Twice: a save that takes the name again at this moment is looked at once more, but by the outer one alone.
    _is_over,
    checkpoints.c.tinker_path.in_(sa.select(checkpoints.c.tinker_path).where(_is_over).limit(MAX_ROWS_PER_SWEEP)),
)
_QUEUED_LOADS = (
    sa.select(requests.c.row_id, payloads.c.body)
    .join_from(requests, payloads)
    .where(
        IS_IN_LINE,
        requests.c.kind == OpKind.LOAD_WEIGHTS.value,
        requests.c.state == RequestState.QUEUED.value,
        requests.c.row_id > sa.bindparam("after"),
    )
    .order_by(requests.c.row_id)
    .limit(MAX_PAGE_ROWS)
)

_LOGGED_KINDS = (OpKind.FORWARD_BACKWARD.value, OpKind.OPTIM_STEP.value)
_FINISHED_PAGE = (
    sa.select(
        requests.c.row_id,
        requests.c.kind,
        requests.c.state,
        requests.c.model_id,
        requests.c.seq_id,
        requests.c.in_line,
        requests.c.created_at,
        requests.c.finished_at,
    )
    .where(requests.c.row_id > sa.bindparam("after"))
    .order_by(requests.c.row_id)
    .limit(MAX_ROWS_PER_SWEEP)
)
_SNAPSHOT_SEQ_IDS = (
    sa.select(snapshots.c.model_id, snapshots.c.seq_id)
    .where(snapshots.c.model_id.in_(_ids))
    .order_by(snapshots.c.model_id, snapshots.c.seq_id.desc())
)
_newest_end = (
    sa.select(requests.c.seq_id)
    .where(
        requests.c.model_id == models.c.model_id,
        # Where the search starts; without it, a run that never stepped would be read whole.
        requests.c.seq_id <= models.c.changed_seq,
        requests.c.kind.in_((OpKind.OPTIM_STEP.value, OpKind.LOAD_WEIGHTS.value)),
        requests.c.state == RequestState.DONE.value,
    )
    .order_by(requests.c.seq_id.desc())
    .limit(1)
    .correlate(models)
    .scalar_subquery()
)
_RUNS_OF_PAGE = sa.select(models.c.model_id, models.c.state, _newest_end.label("end")).where(
    models.c.model_id.in_(_ids)
)
# A row that is final and out of the line stays so; only its result may still be there.
_FORGETTABLE = sa.select(requests.c.row_id).where(
    requests.c.row_id.in_(_ids), ~sa.exists().where(results.c.row_id == requests.c.row_id)
)
_FORGET_PAYLOADS = payloads.delete().where(payloads.c.row_id.in_(_ids))
_FORGET_REQUESTS = requests.delete().where(requests.c.row_id.in_(_ids))

_WITH_WEIGHTS = sa.select(sampling_sessions.c.sampling_session_id).where(
    sampling_sessions.c.sampling_session_id.in_(_ids), sampling_sessions.c.is_dropped.is_(sa.false())
)
_RUN_OF_REQUEST = sa.select(models.c.next_seq_id).where(
    models.c.model_id == sa.bindparam("id"), models.c.tenant_id == sa.bindparam("of_tenant")
)
_SAMPLER_OF_REQUEST = sa.select(sampling_sessions.c.sampling_session_id).where(
    sampling_sessions.c.sampling_session_id == sa.bindparam("id"),
    sampling_sessions.c.tenant_id == sa.bindparam("of_tenant"),
)


@dataclass(frozen=True, slots=True)
class RequestSweep:
    """One step through the table of requests. next_row: where the next one starts, None at the end of what is due."""

    num_forgotten: int
    next_row: int | None


@dataclass(frozen=True, slots=True)
class _NeededLog:
    """What of a run's log may be read again: rows behind `snapshot_seq`, and the failures behind `end_seq`, the newest
    step or load: the next step reports how many passes it had to do without since then."""

    snapshot_seq: int
    end_seq: int
    is_over: bool

    def needs(self, kind: str, state: str, seq_id: int) -> bool:
        if self.is_over:
            return False
        if seq_id == self.end_seq:
            return True
        if kind not in _LOGGED_KINDS:
            return False
        if state == RequestState.FAILED:
            return kind == OpKind.FORWARD_BACKWARD and seq_id > self.end_seq
        return seq_id > self.snapshot_seq


class Retention:
    """See the module. Times are seconds since the epoch, of the store's clock."""

    def __init__(self, *, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    async def expire_sessions(self, *, silent_since: float) -> int:
        """Expire active sessions that sent nothing since then; how many. At most MAX_ROWS_PER_SWEEP."""
        return await self._change_sessions(_SILENT, _EXPIRE, silent_since)

    async def revive_sessions(self, *, silent_since: float) -> int:
        """Make expired sessions active again that were heard since then; how many."""
        return await self._change_sessions(_AWAKE, _REVIVE, silent_since)

    async def at_rest(self, model_ids: Collection[ModelId]) -> set[ModelId]:
        """Those of these runs that nothing is queued for and whose session is expired or finished."""

        def find(conn: sa.Connection) -> set[ModelId]:
            found = (conn.execute(_AT_REST, {"ids": chunk}).scalars() for chunk in chunks(list(model_ids)))
            return {ModelId(model_id) for model_ids in found for model_id in model_ids}

        return await self._database.read(find)

    async def unload_finished(self, *, finished_before: float) -> int:
        """End the runs of sessions that were finished before then and have nothing queued; how many.

        Their state goes with the next `Snapshots.retire`, like that of every run that is unloaded.
        """
        due = await self._ids(_OVER, {"before": finished_before})
        return await self._write(_UNLOAD, due)

    async def drop_versions(
        self, *, keep: int, unused_since: float, finished_before: float
    ) -> tuple[int, tuple[BlobKey, ...]]:
        """Drop sampling sessions' weights that are due; how many sessions lost theirs, and blobs without a name now.

        Due are a run's unnamed versions but the newest `keep` of each kind, when they were not used since
        `unused_since` or their session is not active; weights of a checkpoint that is gone, not used since then;
        everything of sessions that were finished before `finished_before`. One that a queued sample takes stays. Rows
        stay, to say what happened.
        """
        values = {"keep": keep, "since": unused_since, "before": finished_before}
        due = await self._database.read(lambda conn: conn.execute(_DUE_VERSIONS, values).all())
        if not due:
            return 0, ()

        def drop(conn: sa.Connection) -> tuple[int, tuple[BlobKey, ...]]:
            dropped = [
                conn.execute(_DROP_VERSION, {"id": id_, "seen_used_at": used_at}).one_or_none() for id_, used_at in due
            ]
            keys = {row.blob_key for row in dropped if row is not None and row.blob_key is not None}
            return sum(row is not None for row in dropped), _unnamed(conn, sorted(keys))

        return await self._writer.run(drop)

    async def dropped_among(self, ids: Sequence[SamplingSessionId]) -> set[SamplingSessionId]:
        """Those of these sampling sessions that cannot be sampled: their weights were dropped, or there is no row."""

        def find(conn: sa.Connection) -> set[SamplingSessionId]:
            kept = {id_ for chunk in chunks(ids) for id_ in conn.execute(_WITH_WEIGHTS, {"ids": chunk}).scalars()}
            return set(ids) - kept

        return await self._database.read(find)

    async def forget_sampling_sessions(self, *, used_before: float) -> int:
        """Remove rows of sampling sessions without weights that were last used before then; how many."""
        values = {"before": used_before}
        return await self._writer.run(lambda conn: conn.execute(_FORGET_SAMPLING_SESSIONS, values).rowcount)

    async def drop_checkpoints(self, *, expired_before: float) -> tuple[int, tuple[BlobKey, ...]]:
        """Remove checkpoints whose time was up before then; how many, and blobs that nobody names any more."""

        def drop(conn: sa.Connection) -> tuple[int, tuple[BlobKey, ...]]:
            # Their time was up before then, which is when they ended.
            ended = end_checkpoints(conn, _DROP_CHECKPOINTS, {"before": expired_before}, now=expired_before)
            return len(ended), _unnamed(conn, sorted({row.blob_key for row in ended}))

        return await self._writer.run(drop)

    async def queued_loads(self) -> list[bytes]:
        """The payloads of all queued loads: the only ops that name a blob which no row may name any more."""
        found: list[bytes] = []
        after = 0
        while rows := await self._page(_QUEUED_LOADS, after):
            found += [row.body for row in rows]
            after = rows[-1].row_id
        return found

    async def unnamed(self, keys: Sequence[BlobKey]) -> tuple[BlobKey, ...]:
        """Those of these keys that no row names."""
        return await self._database.read(lambda conn: _unnamed(conn, keys))

    async def forget_requests(self, *, finished_before: float, after_row: int = 0) -> RequestSweep:
        """Remove finished rows without a result that no restore can need, from `after_row` on, one page of them.

        A run's log stays behind its second newest snapshot; its newest step or load and the passes that failed behind
        it stay for the count that the next step reports. Rows that are passed over stay for a later sweep.
        """
        page = await self._page(_FINISHED_PAGE, after_row)
        old = [row for row in page if row.finished_at is not None and row.finished_at < finished_before]
        due = await self._forgettable([row for row in old if not row.in_line])
        num_forgotten = await self._writer.run(lambda conn: _forget(conn, due)) if due else 0
        # Rows come in the order of their admission, so behind a young one there is nothing old.
        is_end = len(page) < MAX_ROWS_PER_SWEEP or page[-1].created_at >= finished_before
        return RequestSweep(num_forgotten, None if is_end else page[-1].row_id)

    async def was_forgotten(self, request_id: RequestId, tenant_id: TenantId) -> bool:
        """Whether a request id without a row may be one that was swept: its run or its sampling session is there."""
        owner, _, number = request_id.rpartition(":")
        if not number.isdecimal() or len(number) > len(str(2**63)):
            return False
        values = {"id": owner, "of_tenant": tenant_id}

        def look(conn: sa.Connection) -> bool:
            next_seq_id = conn.execute(_RUN_OF_REQUEST, values).scalar_one_or_none()
            if next_seq_id is not None:
                return bool(int(number) < next_seq_id)
            return conn.execute(_SAMPLER_OF_REQUEST, values).scalar_one_or_none() is not None

        return await self._database.read(look)

    async def _change_sessions(self, find: sa.Select[Any], change: sa.Update, silent_since: float) -> int:
        values = {"since": silent_since}
        return await self._write(change, await self._ids(find, values), values)

    async def _write(self, change: sa.Update, due: Sequence[str], values: dict[str, Any] | None = None) -> int:
        if not due:
            return 0
        return await self._writer.run(lambda conn: conn.execute(change, {"ids": due, **(values or {})}).rowcount)

    async def _ids(self, query: sa.Select[Any], values: dict[str, Any]) -> list[str]:
        return await self._database.read(lambda conn: list(conn.execute(query, values).scalars()))

    async def _page(self, query: sa.Select[Any], after: int) -> Sequence[AnyRow]:
        return await self._database.read(lambda conn: conn.execute(query, {"after": after}).all())

    async def _forgettable(self, rows: Sequence[AnyRow]) -> list[int]:
        """Numbers of the rows that no log needs."""
        run_ids = sorted({row.model_id for row in rows if row.model_id is not None})
        needed = await self._database.read(lambda conn: _needed_logs(conn, run_ids)) if run_ids else {}
        return [
            row.row_id
            for row in rows
            if row.model_id is None or not needed[row.model_id].needs(row.kind, row.state, row.seq_id)
        ]


def _forget(conn: sa.Connection, row_ids: Sequence[int]) -> int:
    still_due = {"ids": list(conn.execute(_FORGETTABLE, {"ids": row_ids}).scalars())}
    conn.execute(_FORGET_PAYLOADS, still_due)
    return conn.execute(_FORGET_REQUESTS, still_due).rowcount


def _needed_logs(conn: sa.Connection, run_ids: Sequence[str]) -> dict[str, _NeededLog]:
    seq_ids: dict[str, list[int]] = {run_id: [] for run_id in run_ids}
    for run_id, seq_id in conn.execute(_SNAPSHOT_SEQ_IDS, {"ids": run_ids}):
        seq_ids[run_id].append(seq_id)
    return {
        run_id: _NeededLog(
            # With one snapshot only, nothing of the log may go: should it be unreadable, the start is what is left.
            snapshot_seq=seq_ids[run_id][1] if len(seq_ids[run_id]) > 1 else -1,
            end_seq=-1 if end is None else end,
            is_over=state in (ModelState.UNLOADED, ModelState.FAILED),
        )
        for run_id, state, end in conn.execute(_RUNS_OF_PAGE, {"ids": run_ids})
    }


def _unnamed(conn: sa.Connection, keys: Iterable[str]) -> tuple[BlobKey, ...]:
    wanted = [BlobKey(key) for key in keys]
    named = named_among(conn, wanted) if wanted else set()
    return tuple(key for key in wanted if key not in named)
