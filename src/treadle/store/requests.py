"""Requests: admission, the queue as planning sees it, and futures as clients see them.

It refuses to decide anything about order or fairness; it hands out queue heads. Invariant: once `enqueue` returned,
the request is durable and is answered one day, whoever dies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, PoolName, RequestId, SamplingSessionId, TenantId
from treadle.domain.limits import (
    MAX_HEAD_ROWS,
    MAX_HEADS_PER_MODEL,
    MAX_IDS_PER_QUERY,
    MAX_PAGE_ROWS,
    MAX_ROWS_PER_SWEEP,
)
from treadle.domain.ops import OpKind
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.records import FutureRecord, NewRequest, RequestRecord
from treadle.domain.states import Category, RequestState
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.heads import Heads
from treadle.store.pages import checked_limit
from treadle.store.recent import RecentFutures
from treadle.store.request_rows import IS_REPLAYED, Added, RequestRows, checked_new, chunks
from treadle.store.tables import IS_QUEUED, IS_SAMPLE, AnyRow, payloads, requests, results
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
    requests.c.payload_bytes,
)
_IDS = requests.c.request_id.in_(sa.bindparam("ids", expanding=True))


def _queued_samples_statement(*conditions: sa.ColumnElement[bool]) -> sa.Select[tuple[object, ...]]:
    # Everybody's first, then everybody's second: a tenant with thousands waiting does not hide the others.
    ranked = (
        sa.select(
            requests.c.row_id,
            sa.func.row_number().over(partition_by=requests.c.tenant_id, order_by=requests.c.row_id).label("place"),
        )
        .where(requests.c.pool == sa.bindparam("of_pool"), IS_QUEUED, IS_SAMPLE, *conditions)
        .subquery()
    )
    return (
        sa.select(*_NARROW)
        .join(ranked, ranked.c.row_id == requests.c.row_id)
        .order_by(ranked.c.place, ranked.c.row_id)
        .limit(sa.bindparam("max_rows"))
    )


QUEUED_SAMPLES = _queued_samples_statement()
_QUEUED_SAMPLES_OF_OTHERS = _queued_samples_statement(
    requests.c.tenant_id.not_in(sa.bindparam("besides", expanding=True))
)
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
_OF_MODEL = requests.c.model_id == sa.bindparam("of_model")
LOG = (
    sa.select(*_NARROW)
    .where(_OF_MODEL, requests.c.seq_id > sa.bindparam("after"), requests.c.seq_id < sa.bindparam("before"))
    .where(IS_REPLAYED)
    .order_by(requests.c.seq_id)
    .limit(sa.bindparam("max_rows"))
)
# What ends a gradient: a step consumes it, and a load replaces it.
_NEWEST_END = (
    sa.select(requests.c.seq_id)
    .where(
        _OF_MODEL,
        requests.c.kind.in_((OpKind.OPTIM_STEP.value, OpKind.LOAD_WEIGHTS.value)),
        requests.c.state == RequestState.DONE.value,
    )
    .order_by(requests.c.seq_id.desc())
    .limit(1)
)
_FAILED_PASSES = sa.select(requests.c.seq_id).where(
    _OF_MODEL,
    requests.c.seq_id > sa.bindparam("after"),
    requests.c.kind == OpKind.FORWARD_BACKWARD.value,
    requests.c.state == RequestState.FAILED.value,
)
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
        self._heads = Heads(database, columns=_NARROW, record_of=_record_of)

    async def enqueue(self, request: NewRequest) -> RequestId:
        """The request's id, once its row is durable. A replay changes nothing and gets the same id. Raises as `add`."""
        await self.add(request)
        return request.request_id

    async def add(self, request: NewRequest) -> bool:
        """Whether the request is new, once its row is durable. False for a replay, which changes nothing.

        With a failure set the row is FAILED from the start. Raises InvalidRequest for a seq_id out of range, or one
        that the client gave to a request of another kind, and ServerError when its model or sampling session has no
        row, or another request has its (model, seq_id).
        """

        def announce(added: Added) -> None:
            if added.is_new:
                self.announce_new(request)

        added = await self._writer.run_batched(self._insert_all, checked_new(request), after_commit=announce)
        return added.checked(request)

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
        """Per model with a line, the first ops of it, by seq_id; MAX_HEAD_ROWS in all, and up to `per_model` of each.

        A line holds the queued ops, and the FAILED ones that were refused at admission and have not been passed
        yet: their seq_id is consumed by stepping over it, which a commit of `ModelAdvance.next_seq_id` records.
        Of many lines the first few ops of each are read, and of more than MAX_HEAD_ROWS one part after the other.
        """
        return await self._heads.read(pool, per_model)

    async def queued_samples(
        self, pool: PoolName, limit: int = MAX_PAGE_ROWS, *, besides: Collection[TenantId] = ()
    ) -> list[RequestRecord]:
        """Queued samples, tenants taking turns, each in arrival order; running ones included.

        The caller knows which it handed out. besides: tenants whose samples are left out, MAX_IDS_PER_QUERY at most.
        """
        assert 0 <= limit <= MAX_HEAD_ROWS, limit
        values: dict[str, object] = {"of_pool": pool, "max_rows": limit}
        statement = QUEUED_SAMPLES
        if besides:
            statement, values["besides"] = _QUEUED_SAMPLES_OF_OTHERS, sorted(besides)[:MAX_IDS_PER_QUERY]
        rows = await self._database.read(lambda conn: conn.execute(statement, values).all())
        return [_record_of(row) for row in rows]

    async def known_seq_ids(self, model_id: ModelId, lo: int, hi: int) -> set[int]:
        """The seq_ids in [lo, hi] that have a row, in any state."""
        values = {"of_model": model_id, "lo": lo, "hi": hi}
        return await self._database.read(lambda conn: set(conn.execute(_KNOWN_SEQ_IDS, values).scalars()))

    async def log(
        self, model_id: ModelId, *, after: int, before: int, limit: int = MAX_HEADS_PER_MODEL
    ) -> list[RequestRecord]:
        """The run's DONE forward_backward and optim_step rows with after < seq_id < before: the first `limit`."""
        values = {"of_model": model_id, "after": after, "before": before, "max_rows": checked_limit(limit)}
        rows = await self._database.read(lambda conn: conn.execute(LOG, values).all())
        return [_record_of(row) for row in rows]

    async def failed_passes_since_step(self, model_id: ModelId) -> set[int]:
        """What the next step reports: FAILED forward_backward rows behind the newest DONE optim_step or load_weights.

        Their seq_ids; all of them when there is neither.
        """

        def failed(conn: sa.Connection) -> set[int]:
            newest = conn.execute(_NEWEST_END, {"of_model": model_id}).scalar_one_or_none()
            values = {"of_model": model_id, "after": -1 if newest is None else newest}
            return set(conn.execute(_FAILED_PASSES, values).scalars())

        return await self._database.read(failed)

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

    def _insert_all(self, conn: sa.Connection, new: Sequence[NewRequest]) -> list[Added]:
        return self._rows.insert_each(conn, new, self._clock())


def _record_of(row: AnyRow) -> RequestRecord:
    request_id, tenant_id, pool, kind, state, seq_id, num_tokens, created_at, quanta, *of = row
    model_id, session_id, payload_key, payload_bytes = of
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
        payload_key=None if payload_key is None else BlobKey(payload_key),
        payload_bytes=payload_bytes,
    )
