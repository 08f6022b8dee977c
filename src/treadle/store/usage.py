"""What tenants used, summed per hour: counted by the commits that make work final, and for storage once an hour.

It refuses to know prices and who may read. Invariants: work is counted in the transaction that makes its row final,
and a row becomes final once, so neither a replay nor a repeated commit counts twice; an hour's storage is written once,
whoever does it, and holds every checkpoint that was there for any part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import sqlalchemy as sa

from treadle.domain.ids import SessionId, TenantId, op_request_id
from treadle.domain.limits import MAX_UNPAGED_ROWS, MAX_USAGE_WINDOW_S, USAGE_KEPT_S
from treadle.domain.ops import OpKind
from treadle.domain.records import CheckpointRecord
from treadle.domain.usage import HOUR_S, StorageRecord, UsageKind, UsageRecord, hour_of
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.request_rows import FinishedRow, chunks
from treadle.store.sessions import session_project
from treadle.store.tables import checkpoints, ended_checkpoints, models, sampling_sessions, sessions, usage_events
from treadle.store.writer import Writer

_PASSES = frozenset({OpKind.FORWARD, OpKind.FORWARD_BACKWARD})
# Runs and sampling sessions whose session is remembered; it never changes.
_MAX_OWNERS = 8_192
# What one transaction deletes: a day's hours.
_FORGET_STEP_S = 24 * HOUR_S

_u = usage_events.c
_KEY = (_u.tenant_id, _u.bucket_start, _u.session_id, _u.model_id, _u.base_model, _u.kind)
_OF_MODELS = sa.select(models.c.model_id, models.c.session_id, models.c.model_id, models.c.base_model).where(
    models.c.model_id.in_(sa.bindparam("ids", expanding=True))
)
_OF_SAMPLERS = sa.select(
    sampling_sessions.c.sampling_session_id,
    sampling_sessions.c.session_id,
    sa.func.coalesce(sampling_sessions.c.model_id, ""),
    sampling_sessions.c.base_model,
).where(sampling_sessions.c.sampling_session_id.in_(sa.bindparam("ids", expanding=True)))
_EVENTS = (
    sa.select(*_KEY, _u.amount)
    .where(
        _u.tenant_id == sa.bindparam("of_tenant"),
        _u.bucket_start >= sa.bindparam("since"),
        _u.bucket_start < sa.bindparam("before"),
    )
    .order_by(_u.bucket_start, _u.amount.desc(), _u.session_id, _u.model_id, _u.base_model, _u.kind)
    .limit(sa.bindparam("max_rows"))
)
_NEWEST_STORAGE = sa.select(sa.func.max(_u.bucket_start)).where(_u.kind == UsageKind.STORAGE.value)
_OLDEST = sa.select(sa.func.min(_u.bucket_start))
_OLDEST_CHECKPOINTS = tuple(sa.select(sa.func.min(table.c.created_at)) for table in (checkpoints, ended_checkpoints))
_FORGET_ENDED = ended_checkpoints.delete().where(ended_checkpoints.c.ended_at <= sa.bindparam("end", type_=sa.Double))
_FORGET = usage_events.delete().where(_u.bucket_start < sa.bindparam("before"))


class _Owner(NamedTuple):
    """What a run or a sampling session belongs to. model_id: the run whose weights are meant, "" for none."""

    session_id: SessionId
    model_id: str
    base_model: str


# By base model and kind, of all tenants.
Used: TypeAlias = Mapping[tuple[str, UsageKind], float]


class UsageCounter:
    """Counts inside a write transaction."""

    def __init__(self, dialect: Dialect) -> None:
        insert = dialect.insert(usage_events)
        self._add = insert.on_conflict_do_update(
            index_elements=list(_KEY), set_={"amount": _u.amount + insert.excluded.amount}
        )
        self._owners: dict[str, _Owner] = {}

    def count(
        self,
        conn: sa.Connection,
        finished: Sequence[FinishedRow],
        *,
        saved: Sequence[CheckpointRecord] = (),
        now: float,
    ) -> Used:
        """Add what these rows, which became final in this transaction, used, and of `saved` what they made; the sums.

        Passes and saves that failed used nothing; a sample used what its outcome says, even if it was cancelled.
        """
        request_ids = {row.request_id for row in finished if row.is_done}
        totals: Counter[tuple[TenantId, str, UsageKind]] = Counter()
        for row in finished:
            if row.kind in _PASSES and row.model_id is not None:
                totals[row.tenant_id, row.model_id, UsageKind.TRAINING] += row.num_tokens if row.is_done else 0
            elif row.sampling_session_id is not None and (used := row.outcome.usage) is not None:
                owner = row.tenant_id, row.sampling_session_id
                totals[*owner, UsageKind.PREFILL] += used.num_prompt_tokens - used.num_cached_tokens
                totals[*owner, UsageKind.PREFILL_CACHED] += used.num_cached_tokens
                totals[*owner, UsageKind.SAMPLED] += used.num_sampled_tokens
        for record in saved:
            if op_request_id(record.model_id, record.seq_id) in request_ids:
                totals[record.tenant_id, record.model_id, UsageKind.CHECKPOINT] += 1
        return self._write(conn, +totals, hour_of(now))

    def _write(self, conn: sa.Connection, totals: Counter[tuple[TenantId, str, UsageKind]], hour: int) -> Used:
        if not totals:
            return {}
        self._learn_owners(conn, {owner for _, owner, _ in totals})
        amounts: Counter[tuple[TenantId, SessionId, str, str, UsageKind]] = Counter()
        for (tenant_id, owner, kind), amount in totals.items():
            amounts[tenant_id, *self._owners[owner], kind] += amount
        # Sorted, so that two pools that count the same tenants cannot deadlock.
        rows = [
            {
                "tenant_id": tenant_id,
                "bucket_start": hour,
                "session_id": session_id,
                "model_id": model_id,
                "base_model": base_model,
                "kind": kind.value,
                "amount": float(amount),
            }
            for (tenant_id, session_id, model_id, base_model, kind), amount in sorted(amounts.items())
        ]
        conn.execute(self._add, rows)
        used: Counter[tuple[str, UsageKind]] = Counter()
        for (_, _, _, base_model, kind), amount in amounts.items():
            used[base_model, kind] += amount
        return dict(used)

    def _learn_owners(self, conn: sa.Connection, wanted: set[str]) -> None:
        unknown = sorted(wanted - self._owners.keys())
        if len(self._owners) + len(unknown) > _MAX_OWNERS:
            self._owners.clear()
            unknown = sorted(wanted)
        for chunk in chunks(unknown):
            for statement in (_OF_MODELS, _OF_SAMPLERS):
                for owner, session_id, model_id, base_model in conn.execute(statement, {"ids": chunk}):
                    self._owners[owner] = _Owner(session_id, model_id, base_model)


class Usage:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, events: Events, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._clock = clock
        self._accrue = (
            database.dialect.insert(usage_events)
            .from_select([column.name for column in (*_KEY, _u.amount)], _stored_in_an_hour())
            .on_conflict_do_nothing(index_elements=list(_KEY))
            .returning(_u.base_model, _u.amount)
        )

    async def events(self, tenant_id: TenantId, *, since: int, before: int) -> list[UsageRecord] | None:
        """A tenant's rows of the hours that begin in [since, before), by hour, then by amount, largest first.

        None when there are more than MAX_UNPAGED_ROWS.
        """
        values = {"of_tenant": tenant_id, "since": since, "before": before, "max_rows": MAX_UNPAGED_ROWS + 1}
        rows = await self._database.read(lambda conn: conn.execute(_EVENTS, values).all())
        if len(rows) > MAX_UNPAGED_ROWS:
            return None
        return [
            UsageRecord(
                tenant_id=TenantId(row.tenant_id),
                bucket_start=row.bucket_start,
                session_id=SessionId(row.session_id),
                model_id=row.model_id,
                base_model=row.base_model,
                kind=UsageKind(row.kind),
                amount=row.amount,
            )
            for row in rows
        ]

    async def storage(self, tenant_id: TenantId, project_id: str | None = None) -> list[StorageRecord]:
        """What a tenant's live checkpoints take now, by project; of one project when it is given."""
        c = checkpoints.c
        project = session_project.label("project")
        query = (
            sa.select(project, sa.func.count(), sa.func.sum(c.size_bytes))
            .join_from(checkpoints, models)
            .join(sessions, sessions.c.session_id == models.c.session_id)
            .where(c.tenant_id == tenant_id, sa.or_(c.expires_at.is_(None), c.expires_at > self._clock()))
            .group_by(project)
            .order_by(project)
        )
        if project_id is not None:
            query = query.where(session_project == project_id)
        rows = await self._database.read(lambda conn: conn.execute(query).all())
        return [StorageRecord(tenant_id, name, count, int(num_bytes)) for name, count, num_bytes in rows]

    async def first_hour_to_accrue(self) -> int:
        """The first hour whose storage may not be written yet; at most MAX_USAGE_WINDOW_S ago."""

        def read(conn: sa.Connection) -> tuple[int | None, float | None]:
            oldest = [conn.execute(query).scalar_one() for query in _OLDEST_CHECKPOINTS]
            return conn.execute(_NEWEST_STORAGE).scalar_one(), min(
                (at for at in oldest if at is not None), default=None
            )

        now = self._clock()
        newest, oldest = await self._database.read(read)
        first = newest + HOUR_S if newest is not None else hour_of(now if oldest is None else oldest)
        return max(first, hour_of(now - MAX_USAGE_WINDOW_S))

    async def accrue_storage(self, hour: int) -> None:
        """Write what checkpoints took in the hour that begins at `hour` and is over. Idempotent.

        Hours come in their order: what ended before this one's end is forgotten.
        """
        assert hour == hour_of(hour), hour
        assert hour + HOUR_S <= self._clock(), "the hour is not over"
        values = {"hour": hour, "begin": float(hour), "end": float(hour + HOUR_S)}

        def write(conn: sa.Connection) -> Used:
            # One statement, so that a checkpoint that ends at this moment is seen either live or ended.
            added = conn.execute(self._accrue, values).all()
            conn.execute(_FORGET_ENDED, {"end": values["end"]})
            used: Counter[tuple[str, UsageKind]] = Counter()
            for base_model, amount in added:
                used[base_model, UsageKind.STORAGE] += amount
            return dict(used)

        await self._writer.run(write, after_commit=self._events.announce_used)

    async def forget(self) -> int:
        """Delete a day of what is older than USAGE_KEPT_S: how many rows."""

        def write(conn: sa.Connection) -> int:
            oldest = conn.execute(_OLDEST).scalar_one()
            before = hour_of(self._clock() - USAGE_KEPT_S)
            if oldest is None or oldest >= before:
                return 0
            return conn.execute(_FORGET, {"before": min(before, oldest + _FORGET_STEP_S)}).rowcount

        return await self._writer.run(write)


def _stored_in_an_hour() -> sa.Select[tuple[object, ...]]:
    """Rows of usage_events for the hour [begin, end): each checkpoint's bytes times the seconds that it was there."""
    begin, end = (sa.bindparam(name, type_=sa.Double) for name in ("begin", "end"))
    there = sa.union_all(
        _there_between(checkpoints, checkpoints.c.expires_at, begin, end),
        _there_between(ended_checkpoints, ended_checkpoints.c.ended_at, begin, end),
    ).subquery()
    t = there.c
    return (
        sa.select(
            t.tenant_id,
            sa.bindparam("hour", type_=sa.BigInteger),
            models.c.session_id,
            t.model_id,
            t.base_model,
            sa.literal_column(f"'{UsageKind.STORAGE.value}'"),
            sa.func.sum(t.byte_seconds),
        )
        .join_from(there, models, models.c.model_id == t.model_id)
        .group_by(t.tenant_id, models.c.session_id, t.model_id, t.base_model)
    )


def _there_between(
    table: sa.Table, gone_at: sa.ColumnElement[float], begin: sa.BindParameter[float], end: sa.BindParameter[float]
) -> sa.Select[tuple[object, ...]]:
    """The checkpoints of `table` that were there for a part of [begin, end), and their bytes times its seconds."""
    c = table.c
    came = sa.case((c.created_at > begin, c.created_at), else_=begin)
    went = sa.case((gone_at < end, gone_at), else_=end)
    return sa.select(c.tenant_id, c.model_id, c.base_model, (c.size_bytes * (went - came)).label("byte_seconds")).where(
        c.created_at < end, c.size_bytes > 0, sa.or_(gone_at.is_(None), gone_at > begin)
    )
