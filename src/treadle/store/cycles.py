"""The scheduler's commits: one fenced transaction per cycle.

It refuses to judge outcomes; it makes all of them public at once. Invariant: everything a cycle changes (rows,
results, runs, names of blobs, usage) becomes visible together, and only while the leader's lease is the newest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, RequestId, TenantId, op_request_id
from treadle.domain.ops import OpKind
from treadle.domain.outcome import Failure
from treadle.domain.policy import Policies
from treadle.domain.rates import Spent
from treadle.domain.records import (
    CheckpointRecord,
    FinishedCycle,
    FinishedRequest,
    LeaseRecord,
    ModelAdvance,
    NewRequest,
)
from treadle.domain.states import Category
from treadle.domain.usage import SampleUsage
from treadle.store import audit
from treadle.store.checkpoints import CheckpointUpserts, event_of
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.leases import Leases, fence
from treadle.store.quotas import judge_saves
from treadle.store.rates import RateCounter, Rates
from treadle.store.recent import RecentFutures
from treadle.store.request_rows import FinishedRow, RequestRows, checked_new
from treadle.store.runlog import RunLogInserts
from treadle.store.sampling import SamplingInserts
from treadle.store.snapshots import STATES_OVER, SnapshotRows
from treadle.store.stability import RecordUpserts
from treadle.store.tables import IS_IN_LINE, IS_QUEUED, IS_SAMPLE, models, requests, usage
from treadle.store.usage import UsageCounter, Used
from treadle.store.writer import Writer

# Nothing was decided by anybody.
NO_POLICIES = Policies()

_new_state = sa.bindparam("new_state", type_=sa.Text)


def _unless_none(name: str) -> sa.ColumnElement[object]:
    """The bound value, or what the column holds when it is None."""
    column = models.c[name]
    return sa.func.coalesce(sa.bindparam(f"new_{name}", type_=column.type), column)


# One statement for every shape of advance, so that a cycle's advances are one batch.
_ADVANCE = (
    models.update()
    .where(models.c.model_id == sa.bindparam("of_model"))
    .values(
        next_seq_id=sa.bindparam("new_next_seq_id"),
        last_request_at=sa.bindparam("now"),
        state=sa.func.coalesce(_new_state, models.c.state),
        state_message=sa.case((_new_state.is_(None), models.c.state_message), else_=sa.bindparam("new_message")),
        **{name: _unless_none(name) for name in ("incarnation", "changed_seq")},
    )
)
_QUEUED_SAMPLE = sa.select(requests.c.row_id).where(requests.c.request_id == sa.bindparam("id"), IS_QUEUED, IS_SAMPLE)
# Finished rows left the line on their own; this takes out the refused ones that planning stepped over.
_STEP_OVER = (
    requests.update()
    .where(
        requests.c.pool == sa.bindparam("of_pool"),
        requests.c.model_id == sa.bindparam("of_model"),
        requests.c.seq_id < sa.bindparam("new_next_seq_id"),
        IS_IN_LINE,
        requests.c.state != sa.literal_column("'queued'"),
    )
    .values(in_line=sa.false())
)
_USAGE = sa.select(usage.c.trained_tokens).where(usage.c.tenant_id == sa.bindparam("of_tenant"))


@dataclass(frozen=True, slots=True)
class _Committed:
    """What a commit made final, the blobs that nobody names since, what it took of rates, and what was used.

    outcomes: as they were stored. at: when, on the store's clock.
    """

    request_ids: tuple[RequestId, ...]
    unused_keys: tuple[BlobKey, ...]
    outcomes: Sequence[FinishedRequest] = ()
    spent: tuple[Spent, ...] = ()
    at: float = 0.0
    used: Used = field(default_factory=dict)


class Cycles:
    """See the module."""

    def __init__(
        self,
        *,
        database: Database,
        writer: Writer,
        events: Events,
        leases: Leases,
        rows: RequestRows,
        recent: RecentFutures,
        sampling: SamplingInserts,
        snapshots: SnapshotRows,
        rates: Rates,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._leases = leases
        self._rows = rows
        self._recent = recent
        self._sampling = sampling
        self._snapshots = snapshots
        self._rates = rates
        self._clock = clock
        self._checkpoints = CheckpointUpserts(database.dialect)
        self._run_log = RunLogInserts(database.dialect)
        self._usage = UsageCounter(database.dialect)
        self._rate_counter = RateCounter(database.dialect)
        self._records = RecordUpserts(database.dialect)
        insert_usage = database.dialect.insert(usage)
        self._add_usage = insert_usage.on_conflict_do_update(
            index_elements=[usage.c.tenant_id],
            set_={"trained_tokens": usage.c.trained_tokens + insert_usage.excluded.trained_tokens},
        )

    async def begin(self, lease: LeaseRecord, cycle: int, request_ids: Sequence[RequestId]) -> None:
        """Note in the lease row what a worker is about to get. Raises Fenced."""
        await self._leases.begin_cycle(lease, cycle, request_ids)

    async def finish(
        self,
        lease: LeaseRecord,
        cycle: FinishedCycle,
        *,
        policies: Policies = NO_POLICIES,
        still_in_flight: Sequence[RequestId] = (),
    ) -> tuple[BlobKey, ...]:
        """Commit a cycle whole; the keys of blobs that nobody names any more, for the caller to delete.

        still_in_flight: what other workers of the pool have, as `begin` noted it.

        Raises Fenced, with nothing written, when another leader took the pool. Rows that are final already are left
        alone, so that a commit whose answer was lost can be repeated. A request that arrived after planning gave it
        up as never received becomes FAILED like the others. A save for which its tenant's quotas have no room fails,
        whatever else was decided before.
        """
        sent = cycle
        for request in sent.never_received:
            assert request.failure is not None, "a request that never came has failed"
            checked_new(request)

        def write(conn: sa.Connection) -> _Committed:
            fence(conn, lease, ends_cycle=True, still_in_flight=still_in_flight)
            now = self._clock()
            judged = judge_saves(conn, self._database.dialect, sent, policies, now)
            cycle = judged.cycle
            added = self._rows.insert(conn, cycle.never_received, now)
            late = [_failed(request) for request in cycle.never_received if request.request_id not in added]
            finished = self._rows.finish(conn, [*cycle.finished, *late], now)
            self._advance(conn, lease, cycle.advances, now)
            self._checkpoints.upsert(conn, cycle.checkpoints)
            audit.add(conn, _saves(cycle.checkpoints, finished, now))
            self._sampling.insert(conn, cycle.sampling_sessions)
            unused = self._snapshots.register(conn, cycle.snapshots, also=_cut_off(cycle, finished), now=now)
            self._run_log.insert(conn, cycle.run_log)
            self._count_usage(conn, finished)
            used = self._usage.count(conn, finished, saved=cycle.checkpoints, now=now)
            never_came = (r.request_id for r in cycle.never_received if r.request_id in added)
            return _Committed(
                request_ids=(*(row.request_id for row in finished), *never_came),
                unused_keys=(*_dropped(finished), *unused, *judged.unused_keys),
                outcomes=cycle.finished,
                spent=self._rate_counter.count(conn, finished, policies, now),
                at=now,
                used=used,
            )

        committed = await self._writer.run(write, after_commit=self._announce)
        return committed.unused_keys

    async def finish_samples(
        self, lease: LeaseRecord, finished: Sequence[FinishedRequest], *, policies: Policies = NO_POLICIES
    ) -> tuple[BlobKey, ...]:
        """Commit finished samples and what they recorded; blobs to delete as for `finish`. Final rows are left alone.

        Raises Fenced.
        """

        def write(conn: sa.Connection) -> _Committed:
            fence(conn, lease, ends_cycle=False)
            now = self._clock()
            rows = self._rows.finish(conn, finished, now)
            self._records.upsert(conn, rows, now)
            used = self._usage.count(conn, rows, now=now)
            spent = self._rate_counter.count(conn, rows, policies, now)
            return _Committed(tuple(row.request_id for row in rows), _dropped(rows), finished, spent, now, used)

        committed = await self._writer.run(write, after_commit=self._announce)
        return committed.unused_keys

    async def cancel_sample(
        self, request_id: RequestId, *, used: SampleUsage | None = None, policies: Policies = NO_POLICIES
    ) -> tuple[BlobKey, ...]:
        """End a queued sample for which nobody waits; blobs to delete as for `finish`. Others are left alone.

        used: what its client got of it before; it is counted like that of a sample that is done.

        A result that a sampler commits later is dropped, and whoever leads the pool hears of it as of every row that
        is final.
        """
        failure = Failure("this sample was cancelled", Category.USER)
        cancelled = [FinishedRequest(request_id, failure=failure, usage=used)]

        def write(conn: sa.Connection) -> _Committed:
            is_sample = conn.execute(_QUEUED_SAMPLE, {"id": request_id}).one_or_none() is not None
            now = self._clock()
            rows = self._rows.finish(conn, cancelled if is_sample else [], now)
            used = self._usage.count(conn, rows, now=now)
            spent = self._rate_counter.count(conn, rows, policies, now)
            return _Committed(tuple(row.request_id for row in rows), _dropped(rows), cancelled, spent, now, used)

        committed = await self._writer.run(write, after_commit=self._announce)
        return committed.unused_keys

    async def trained_tokens(self, tenant_id: TenantId) -> int:
        """Tokens of all passes that were committed for a tenant."""
        values = {"of_tenant": tenant_id}
        total = await self._database.read(lambda conn: conn.execute(_USAGE, values).scalar_one_or_none())
        return total or 0

    def _announce(self, committed: _Committed) -> None:
        self._rates.note(committed.spent, committed.at)
        self._events.announce_used(committed.used)
        self._recent.finished(committed.outcomes, committed.request_ids)
        self._events.announce_finished(committed.request_ids)

    def _advance(self, conn: sa.Connection, lease: LeaseRecord, advances: Sequence[ModelAdvance], now: float) -> None:
        if not advances:
            return
        assert len({advance.model_id for advance in advances}) == len(advances), "one advance per run"
        rows = [_advance_values(advance, now) for advance in advances]
        updated = conn.execute(_ADVANCE, rows).rowcount
        assert updated in (len(rows), -1), "an advance of an unknown run"
        steps = ("of_model", "new_next_seq_id")
        conn.execute(_STEP_OVER, [{"of_pool": lease.pool} | {name: row[name] for name in steps} for row in rows])

    def _count_usage(self, conn: sa.Connection, finished: Sequence[FinishedRow]) -> None:
        trained: Counter[TenantId] = Counter()
        for row in finished:
            if row.is_done and row.kind is OpKind.FORWARD_BACKWARD:
                trained[row.tenant_id] += row.num_tokens
        # Sorted, so that two pools that count the same tenants cannot deadlock.
        rows = [{"tenant_id": id_, "trained_tokens": count} for id_, count in sorted(trained.items()) if count]
        if rows:
            conn.execute(self._add_usage, rows)


def _cut_off(cycle: FinishedCycle, finished: Sequence[FinishedRow]) -> set[ModelId]:
    """Runs that have no more use for what they were before: they are over, or hold what they loaded."""
    over = {advance.model_id for advance in cycle.advances if advance.state in STATES_OVER}
    loaded = {row.model_id for row in finished if row.is_done and row.kind is OpKind.LOAD_WEIGHTS}
    return over | {model_id for model_id in loaded if model_id is not None}


def _saves(records: Sequence[CheckpointRecord], finished: Sequence[FinishedRow], now: float) -> list[audit.AuditEvent]:
    """What these saves leave in the audit log: nothing when the commit is repeated."""
    final = {row.request_id for row in finished}
    return [
        event_of(
            "checkpoint_save",
            record.tenant_id,
            path=record.tinker_path,
            model_id=record.model_id,
            now=now,
            size_bytes=record.size_bytes,
            expires_at=record.expires_at,
        )
        for record in records
        if op_request_id(record.model_id, record.seq_id) in final
    ]


def _dropped(rows: Sequence[FinishedRow]) -> tuple[BlobKey, ...]:
    return tuple(key for row in rows if (key := row.dropped_key) is not None)


def _failed(request: NewRequest) -> FinishedRequest:
    return FinishedRequest(request_id=request.request_id, failure=request.failure)


def _advance_values(advance: ModelAdvance, now: float) -> dict[str, object]:
    return {
        "of_model": advance.model_id,
        "new_next_seq_id": advance.next_seq_id,
        "now": now,
        "new_state": None if advance.state is None else advance.state.value,
        "new_message": advance.state_message,
        "new_incarnation": advance.incarnation,
        "new_changed_seq": advance.changed_seq,
    }
