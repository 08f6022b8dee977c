"""Requests: admission, the queue as planning sees it, and futures as clients see them.

It refuses to decide anything about order or fairness; it hands out queue heads. Invariant: once `enqueue` returned,
the request is durable and is answered one day, whoever dies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, PoolName, RequestId, SamplingSessionId, TenantId
from treadle.domain.limits import MAX_HEAD_ROWS, MAX_HEADS_PER_MODEL, MAX_PAGE_ROWS, MAX_ROWS_PER_SWEEP
from treadle.domain.ops import OpKind
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.records import FutureRecord, NewRequest, RequestRecord
from treadle.domain.states import Category, RequestState
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.pages import checked_limit
from treadle.store.recent import RecentFutures
from treadle.store.request_rows import RequestRows, checked_new, chunks
from treadle.store.tables import IS_IN_LINE, IS_QUEUED, IS_SAMPLE, AnyRow, payloads, requests, results
from treadle.store.writer import Writer

_NARROW = (
    requests.c.request_id,
    requests.c.tenant_id,
    requests.c.pool,
    requests.c.kind,
    requests.c.state,
    requests.c.seq_id,
    requests.c.num_tokens,
    requests.c.created_at,
    requests.c.quantum_tokens,
    requests.c.model_id,
    requests.c.sampling_session_id,
    requests.c.payload_key,
)
_IDS = requests.c.request_id.in_(sa.bindparam("ids", expanding=True))


def _heads_statement() -> sa.Select[tuple[object, ...]]:
    # The inner query touches nothing but the partial index; only the rows that count are fetched.
    ranked = (
        sa.select(
            requests.c.row_id,
            sa.func.row_number().over(partition_by=requests.c.model_id, order_by=requests.c.seq_id).label("place"),
        )
        .where(requests.c.pool == sa.bindparam("of_pool"), IS_IN_LINE)
        .subquery()
    )
    # When there are too many, every model keeps the start of its line, and older lines go first.
    first = (
        sa.select(ranked.c.row_id)
        .where(ranked.c.place <= sa.bindparam("per_model"))
        .order_by(ranked.c.place, ranked.c.row_id)
        .limit(sa.bindparam("max_rows"))
    )
    return sa.select(*_NARROW).where(requests.c.row_id.in_(first)).order_by(requests.c.model_id, requests.c.seq_id)


def _queued_samples_statement() -> sa.Select[tuple[object, ...]]:
    # Everybody's first, then everybody's second: a tenant with thousands waiting does not hide the others.
    ranked = (
        sa.select(
            requests.c.row_id,
            sa.func.row_number().over(partition_by=requests.c.tenant_id, order_by=requests.c.row_id).label("place"),
        )
        .where(requests.c.pool == sa.bindparam("of_pool"), IS_QUEUED, IS_SAMPLE)
        .subquery()
    )
    return (
        sa.select(*_NARROW)
        .join(ranked, ranked.c.row_id == requests.c.row_id)
        .order_by(ranked.c.place, ranked.c.row_id)
        .limit(sa.bindparam("max_rows"))
    )


HEADS = _heads_statement()
QUEUED_SAMPLES = _queued_samples_statement()
_GET = sa.select(*_NARROW).where(requests.c.request_id == sa.bindparam("id"))
_FUTURE = (
    sa.select(
        requests.c.tenant_id,
        requests.c.kind,
        requests.c.state,
        requests.c.error,
        requests.c.category,
        requests.c.is_transient,
        results.c.content_type,
        results.c.body,
    )
    .outerjoin_from(requests, results)
    .where(requests.c.request_id == sa.bindparam("id"))
)
_STATES = sa.select(requests.c.request_id, requests.c.state).where(_IDS)
_PAYLOADS = (
    sa.select(requests.c.request_id, requests.c.payload_key, payloads.c.body)
    .outerjoin_from(requests, payloads)
    .where(_IDS)
)
_KNOWN_SEQ_IDS = sa.select(requests.c.seq_id).where(
    requests.c.model_id == sa.bindparam("of_model"),
    requests.c.seq_id.between(sa.bindparam("lo"), sa.bindparam("hi")),
)
_COUNT_QUEUED = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(requests.c.num_tokens), 0)).where(IS_QUEUED)
_COUNT_QUEUED_OF_TENANT = _COUNT_QUEUED.where(requests.c.tenant_id == sa.bindparam("of_tenant"))
_ROW_IDS = sa.select(requests.c.row_id).where(_IDS)
_DROP_RESULTS = results.delete().where(results.c.row_id.in_(_ROW_IDS))
_MARK_DELIVERED = (
    results.update()
    .where(results.c.row_id.in_(_ROW_IDS), results.c.delivered_at.is_(None))
    .values(delivered_at=sa.bindparam("now"))
)
# A result is delivered after it is finished, so the index on finished_at bounds both halves of the search.
_STALE_RESULTS = (
    sa.select(results.c.row_id)
    .where(
        sa.or_(
            sa.and_(
                results.c.finished_at < sa.bindparam("delivered_before"),
                results.c.delivered_at < sa.bindparam("delivered_before"),
            ),
            results.c.finished_at < sa.bindparam("undelivered_before"),
        )
    )
    .limit(sa.bindparam("max_rows"))
)
_DROP_STALE_RESULTS = results.delete().where(results.c.row_id.in_(_STALE_RESULTS))


class Requests:
    """See the module."""

    def __init__(
        self,
        *,
        database: Database,
        writer: Writer,
        events: Events,
        rows: RequestRows,
        recent: RecentFutures,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._rows = rows
        self._recent = recent
        self._clock = clock

    async def enqueue(self, request: NewRequest) -> RequestId:
        """The request's id, once its row is durable. A replay changes nothing and gets the same id. Raises as `add`."""
        await self.add(request)
        return request.request_id

    async def add(self, request: NewRequest) -> bool:
        """Whether the request is new, once its row is durable. False for a replay, which changes nothing.

        With a failure set the row is FAILED from the start. Raises InvalidRequest for a seq_id out of range and
        ServerError when its model or sampling session has no row, or another request has its (model, seq_id).
        """

        def announce(is_new: bool) -> None:
            if is_new:
                self.announce_new(request)

        return await self._writer.run_batched(self._insert_all, checked_new(request), after_commit=announce)

    async def get(self, request_id: RequestId) -> RequestRecord | None:
        """The narrow row."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": request_id}).one_or_none())
        return None if row is None else _record_of(row)

    async def future(self, request_id: RequestId) -> FutureRecord | None:
        """State and, once final, result or failure. A result that was dropped is reported as expired.

        What another process finished may be reported as queued until the next `futures_state` of it.
        """
        known = self._recent.get(request_id)
        if known is not None:
            return known
        row = await self._database.read(lambda conn: conn.execute(_FUTURE, {"id": request_id}).one_or_none())
        if row is None:
            return None
        tenant_id, kind, state, error, category, is_transient, content_type, body = row
        return FutureRecord(
            request_id=request_id,
            tenant_id=TenantId(tenant_id),
            kind=OpKind(kind),
            state=RequestState(state),
            result=None if body is None else EncodedResult(content_type=content_type, body=body),
            failure=None if error is None else Failure(message=error, category=Category(category)),
            is_transient=is_transient,
            is_expired=state == RequestState.DONE and body is None,
        )

    async def futures_state(self, request_ids: Sequence[RequestId]) -> dict[RequestId, RequestState]:
        """The state of each request that exists."""

        def states(conn: sa.Connection) -> dict[RequestId, RequestState]:
            rows = (row for chunk in chunks(request_ids) for row in conn.execute(_STATES, {"ids": chunk}))
            return {RequestId(request_id): RequestState(state) for request_id, state in rows}

        found = await self._database.read(states)
        self._recent.correct(found)
        return found

    async def payload(self, request_id: RequestId) -> tuple[bytes, BlobKey | None]:
        """The stored payload, or b"" and the key of the blob that holds it; b"" and None when it has none."""
        return (await self.payloads([request_id])).get(request_id, (b"", None))

    async def payloads(self, request_ids: Sequence[RequestId]) -> dict[RequestId, tuple[bytes, BlobKey | None]]:
        """Like `payload`, for each request that exists."""

        def bodies(conn: sa.Connection) -> dict[RequestId, tuple[bytes, BlobKey | None]]:
            rows = (row for chunk in chunks(request_ids) for row in conn.execute(_PAYLOADS, {"ids": chunk}))
            return {RequestId(request_id): (body or b"", key and BlobKey(key)) for request_id, key, body in rows}

        return await self._database.read(bodies)

    async def heads(self, pool: PoolName, per_model: int = MAX_HEADS_PER_MODEL) -> list[tuple[RequestRecord, ...]]:
        """Per model with a line, the first `per_model` ops of it, by seq_id; MAX_HEAD_ROWS in all.

        A line holds the queued ops, and the FAILED ones that were refused at admission and have not been passed
        yet: their seq_id is consumed by stepping over it, which a commit of `ModelAdvance.next_seq_id` records.
        """
        assert 0 < per_model <= MAX_HEADS_PER_MODEL, per_model
        values = {"of_pool": pool, "per_model": per_model, "max_rows": MAX_HEAD_ROWS}
        rows = await self._database.read(lambda conn: conn.execute(HEADS, values).all())
        records = (_record_of(row) for row in rows)
        return [tuple(line) for _model_id, line in groupby(records, key=lambda record: record.model_id)]

    async def queued_samples(self, pool: PoolName, limit: int = MAX_PAGE_ROWS) -> list[RequestRecord]:
        """Queued samples, tenants taking turns, each in arrival order; running ones included.

        The caller knows which it handed out.
        """
        values = {"of_pool": pool, "max_rows": checked_limit(limit)}
        rows = await self._database.read(lambda conn: conn.execute(QUEUED_SAMPLES, values).all())
        return [_record_of(row) for row in rows]

    async def count_queued(self, tenant_id: TenantId | None = None) -> tuple[int, int]:
        """Queued requests and their tokens, of one tenant or of all."""
        if tenant_id is None:
            row = await self._database.read(lambda conn: conn.execute(_COUNT_QUEUED).one())
        else:
            values = {"of_tenant": tenant_id}
            row = await self._database.read(lambda conn: conn.execute(_COUNT_QUEUED_OF_TENANT, values).one())
        return int(row[0]), int(row[1])

    async def known_seq_ids(self, model_id: ModelId, lo: int, hi: int) -> set[int]:
        """The seq_ids in [lo, hi] that have a row, in any state."""
        values = {"of_model": model_id, "lo": lo, "hi": hi}
        return await self._database.read(lambda conn: set(conn.execute(_KNOWN_SEQ_IDS, values).scalars()))

    async def acknowledge(self, request_ids: Sequence[RequestId]) -> None:
        """Drop the results of requests whose client has them. Queued and unknown requests are left alone."""

        def drop(conn: sa.Connection) -> None:
            for chunk in chunks(request_ids):
                conn.execute(_DROP_RESULTS, {"ids": chunk})

        await self._writer.run(drop)
        self._recent.forget(request_ids)

    async def mark_delivered(self, request_ids: Sequence[RequestId]) -> None:
        """Start the shorter retention of results that were sent once. The first delivery counts."""
        now = self._clock()

        def mark(conn: sa.Connection) -> None:
            for chunk in chunks(request_ids):
                conn.execute(_MARK_DELIVERED, {"ids": chunk, "now": now})

        await self._writer.run(mark)

    async def sweep(self, *, delivered_before: float, undelivered_before: float) -> int:
        """Drop results delivered before the one time, or finished before the other; how many went.

        At most MAX_ROWS_PER_SWEEP of them: call again when that many went. Rows stay, as expired.
        """
        values = {
            "delivered_before": delivered_before,
            "undelivered_before": undelivered_before,
            "max_rows": MAX_ROWS_PER_SWEEP,
        }
        num_dropped = await self._writer.run(lambda conn: conn.execute(_DROP_STALE_RESULTS, values).rowcount)
        self._recent.forget_final()
        return num_dropped

    def announce_new(self, request: NewRequest) -> None:
        """Tell listeners of a committed new row. For the store's own modules."""
        self._recent.admitted(request)
        is_sample = request.kind is OpKind.SAMPLE
        if request.failure is None or not is_sample:
            self._events.announce_enqueued(request.pool, request.kind)
        if request.failure is not None:
            self._events.announce_finished((request.request_id,))

    def _insert_all(self, conn: sa.Connection, new: Sequence[NewRequest]) -> list[bool]:
        added = self._rows.insert(conn, new, self._clock())
        is_new: list[bool] = []
        for request in new:
            is_new.append(request.request_id in added)
            # A second copy in the same group is a replay.
            added.discard(request.request_id)
        return is_new


def _record_of(row: AnyRow) -> RequestRecord:
    request_id, tenant_id, pool, kind, state, seq_id, num_tokens, created_at, quanta, model_id, session_id, key = row
    return RequestRecord(
        request_id=RequestId(request_id),
        tenant_id=TenantId(tenant_id),
        pool=PoolName(pool),
        kind=OpKind(kind),
        state=RequestState(state),
        seq_id=seq_id,
        num_tokens=num_tokens,
        created_at=created_at,
        quantum_tokens=tuple(quanta),
        model_id=None if model_id is None else ModelId(model_id),
        sampling_session_id=None if session_id is None else SamplingSessionId(session_id),
        payload_key=None if key is None else BlobKey(key),
    )
