"""Request rows inside a write transaction: how they come in and how they become final.

Shared by everything that writes requests (admission, model creation, the scheduler's commits). It refuses to know who
calls and whether a lease allows it. Invariants: a row's final state never changes; a final row has a result or an
error, and a payload only as long as a replay may need it (snapshots.py says how long that is); samples of one sampling
session are numbered 1, 2, ... in the order of their commits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, RequestId, SamplingSessionId, TenantId
from treadle.domain.limits import MAX_IDS_PER_QUERY, MAX_INLINE_PAYLOAD_BYTES
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedRequest, NewRequest
from treadle.domain.states import RequestState
from treadle.errors import InvalidRequest
from treadle.store.dialect import Dialect
from treadle.store.tables import IS_QUEUED, payloads, requests, results, sampling_sessions

_MAX_SEQ_ID = 2**63 - 1
# What changes a run's state by its payload: done once, it is what a replay does again.
REPLAYED_KINDS = frozenset({OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP})
IS_REPLAYED = sa.and_(
    requests.c.state == RequestState.DONE.value,
    requests.c.kind.in_(sorted(kind.value for kind in REPLAYED_KINDS)),
)

_SELECT_QUEUED = (
    sa.select(
        requests.c.request_id,
        requests.c.row_id,
        requests.c.kind,
        requests.c.tenant_id,
        requests.c.model_id,
        requests.c.sampling_session_id,
        requests.c.num_tokens,
        requests.c.payload_key,
    )
    .where(requests.c.request_id.in_(sa.bindparam("ids", expanding=True)), IS_QUEUED)
    # Other gateways may refuse or cancel the same rows one day; SQLite has one writer and ignores this.
    .with_for_update()
)
_FINISH = (
    requests.update()
    .where(requests.c.row_id == sa.bindparam("of_row_id"))
    .values(in_line=sa.false())
    .values({name: sa.bindparam(name) for name in ("state", "finished_at", "finished_order", "result_bytes")})
    .values({name: sa.bindparam(name) for name in ("error", "category", "is_transient", "payload_key")})
)
_NUMBER_SAMPLE = (
    requests.update()
    .where(requests.c.row_id == sa.bindparam("of_row_id"))
    .values(finished_order=sa.bindparam("finished_order"))
)
_TAKE_NUMBERS = (
    sampling_sessions.update()
    .where(sampling_sessions.c.sampling_session_id == sa.bindparam("of_session"))
    .values(
        finished_counter=sampling_sessions.c.finished_counter + sa.bindparam("count"),
        last_used_at=sa.bindparam("now"),
    )
    .returning(sampling_sessions.c.finished_counter)
)
# A version that another session's samples take is in use, though none of its own may be.
_USE_WEIGHTS = (
    sampling_sessions.update()
    .where(sampling_sessions.c.sampling_session_id == sa.bindparam("of_session"))
    .values(last_used_at=sa.bindparam("now"))
)
_INSERT_PAYLOAD = payloads.insert()
_INSERT_RESULT = results.insert()
_DROP_PAYLOAD = payloads.delete().where(payloads.c.row_id == sa.bindparam("of_row_id"))


_FIRST = sa.select(requests.c.request_id, requests.c.kind, requests.c.state).where(
    requests.c.request_id.in_(sa.bindparam("ids", expanding=True))
)
_PASSES = frozenset({OpKind.FORWARD, OpKind.FORWARD_BACKWARD})


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a request on its way in. first_kind: of the request that took its place before, unless FAILED."""

    is_new: bool
    first_kind: OpKind | None = None

    def checked(self, request: NewRequest) -> bool:
        """Whether it is new. Raises InvalidRequest when it is no replay: it would get the other one's result.

        A FAILED first one tells its own reason. A pass that was refused may not have been read far enough to know
        which of the two it is.
        """
        kind, first = request.kind, self.first_kind
        if first in (None, kind) or (request.failure is not None and {kind, first} <= _PASSES):
            return self.is_new
        raise InvalidRequest(f"seq_id {request.seq_id} is taken by a request of kind {first}; this one is of {kind}")


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """A row that became final in this transaction. dropped_key: of the blob that it named until now."""

    request_id: RequestId
    row_id: int
    outcome: FinishedRequest
    kind: OpKind
    tenant_id: TenantId
    model_id: ModelId | None
    sampling_session_id: SamplingSessionId | None
    num_tokens: int
    payload_key: BlobKey | None

    @property
    def is_done(self) -> bool:
        return self.outcome.failure is None

    @property
    def keeps_payload(self) -> bool:
        """A replay may need it."""
        return self.is_done and self.kind in REPLAYED_KINDS

    @property
    def dropped_key(self) -> BlobKey | None:
        return None if self.keeps_payload else self.payload_key


class RequestRows:
    """The statements of one dialect; without state, safe to share."""

    def __init__(self, dialect: Dialect) -> None:
        self._insert = (
            dialect.insert(requests)
            .on_conflict_do_nothing(index_elements=[requests.c.request_id])
            .returning(requests.c.request_id, requests.c.row_id)
        )

    def insert(self, conn: sa.Connection, new: Sequence[NewRequest], now: float) -> set[RequestId]:
        """Insert those that are not there yet, with their payloads; the ids that are new. Idempotent by request_id."""
        if not new:
            return set()
        rows = conn.execute(self._insert, [_row_of(request, now) for request in new])
        row_ids: dict[RequestId, int] = {RequestId(request_id): row_id for request_id, row_id in rows}
        # Two copies of one request may stand in one group; the first is the one that was inserted.
        added = list({r.request_id: r for r in reversed(new) if r.request_id in row_ids}.values())
        bodies = [{"row_id": row_ids[r.request_id], "body": r.payload} for r in added if r.payload and not r.failure]
        if bodies:
            conn.execute(_INSERT_PAYLOAD, bodies)
        if borrowed := sorted({r.weights_id for r in added if r.weights_id is not None}):
            conn.execute(_USE_WEIGHTS, [{"of_session": weights_id, "now": now} for weights_id in borrowed])
        refused_samples = [r for r in added if r.failure and r.sampling_session_id is not None]
        if refused_samples:
            numbers = _next_numbers(conn, [_session_of(r) for r in refused_samples], now)
            conn.execute(
                _NUMBER_SAMPLE,
                [
                    {"of_row_id": row_ids[r.request_id], "finished_order": number}
                    for r, number in zip(refused_samples, numbers, strict=True)
                ],
            )
        return set(row_ids)

    def insert_each(self, conn: sa.Connection, new: Sequence[NewRequest], now: float) -> list[Added]:
        """`insert`, and what became of each request; a second copy in one group is a replay."""
        added = self.insert(conn, new, now)
        answers: list[Added | None] = []
        for request in new:
            answers.append(Added(is_new=True) if request.request_id in added else None)
            added.discard(request.request_id)
        firsts = first_kinds(conn, [r.request_id for r, answer in zip(new, answers, strict=True) if answer is None])
        return [
            answer or Added(is_new=False, first_kind=firsts.get(request.request_id))
            for request, answer in zip(new, answers, strict=True)
        ]

    def finish(self, conn: sa.Connection, finished: Sequence[FinishedRequest], now: float) -> list[FinishedRow]:
        """Make queued rows final; those that were queued, in the order given. Others are left alone.

        The payload of a DONE forward_backward or optim_step stays; every other one goes, or is no longer named.
        """
        by_id = {outcome.request_id: outcome for outcome in finished}
        assert len(by_id) == len(finished), "a request ends once"
        assert all((f.result is None) != (f.failure is None) for f in finished), "one of result and failure"
        queued = self._queued_rows(conn, by_id)
        # In the order they were handed over, which is the order clients see completions in.
        rows = [queued[f.request_id] for f in finished if f.request_id in queued]
        if not rows:
            return []
        sampled = [row.sampling_session_id for row in rows if row.sampling_session_id is not None]
        numbers = iter(_next_numbers(conn, sampled, now))
        conn.execute(
            _FINISH, [_final_values(row, next(numbers) if row.sampling_session_id else None, now) for row in rows]
        )
        bodies = [
            {"row_id": row.row_id, "content_type": result.content_type, "body": result.body, "finished_at": now}
            for row in rows
            if (result := row.outcome.result) is not None
        ]
        if bodies:
            conn.execute(_INSERT_RESULT, bodies)
        over = [{"of_row_id": row.row_id} for row in rows if not row.keeps_payload]
        if over:
            conn.execute(_DROP_PAYLOAD, over)
        return rows

    def _queued_rows(
        self, conn: sa.Connection, outcomes: Mapping[RequestId, FinishedRequest]
    ) -> dict[RequestId, FinishedRow]:
        found: dict[RequestId, FinishedRow] = {}
        for chunk in chunks(list(outcomes)):
            for request_id, row_id, kind, tenant_id, model_id, session_id, num_tokens, key in conn.execute(
                _SELECT_QUEUED, {"ids": chunk}
            ):
                found[request_id] = FinishedRow(
                    request_id=request_id,
                    row_id=row_id,
                    outcome=outcomes[request_id],
                    kind=OpKind(kind),
                    tenant_id=tenant_id,
                    model_id=model_id,
                    sampling_session_id=session_id,
                    num_tokens=num_tokens,
                    payload_key=key,
                )
        return found


def first_kinds(conn: sa.Connection, request_ids: Sequence[RequestId]) -> dict[RequestId, OpKind]:
    """The kind of each of these requests that has a row, but for FAILED ones: theirs may be unknown."""
    found = (row for chunk in chunks(request_ids) for row in conn.execute(_FIRST, {"ids": chunk}))
    return {RequestId(id_): OpKind(kind) for id_, kind, state in found if state != RequestState.FAILED}


def chunks(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    """`ids` in pieces that fit into one query."""
    return (ids[start : start + MAX_IDS_PER_QUERY] for start in range(0, len(ids), MAX_IDS_PER_QUERY))


def checked_new(request: NewRequest) -> NewRequest:
    """The request itself. Raises InvalidRequest when a column cannot hold it.

    Called before a request joins a group of writes, so that it cannot make the group fail.
    """
    assert len(request.payload) <= MAX_INLINE_PAYLOAD_BYTES, "larger payloads are blobs"
    assert not (request.payload and request.payload_key), "a payload is in the row or in a blob"
    assert (request.kind is OpKind.SAMPLE) == (request.sampling_session_id is not None), request.kind
    assert (request.kind is OpKind.SAMPLE) == (request.model_id is None), request.kind
    if not 0 <= request.seq_id <= _MAX_SEQ_ID:
        raise InvalidRequest(f"seq_id {request.seq_id} is out of range: 0 to {_MAX_SEQ_ID}")
    return request


def _row_of(request: NewRequest, now: float) -> Mapping[str, Any]:
    failure = request.failure
    return {
        "request_id": request.request_id,
        "tenant_id": request.tenant_id,
        "pool": request.pool,
        "kind": request.kind.value,
        "state": RequestState.QUEUED.value if failure is None else RequestState.FAILED.value,
        "seq_id": request.seq_id,
        "num_tokens": request.num_tokens,
        "quantum_tokens": request.quantum_tokens,
        "model_id": request.model_id,
        "sampling_session_id": request.sampling_session_id,
        "payload_key": request.payload_key,
        "payload_bytes": len(request.payload) or request.payload_bytes,
        "weights_id": request.weights_id,
        "created_at": now,
        # A refused op is stepped over in its turn; a run whose creation (seq_id 0) was refused has no line.
        "in_line": request.kind is not OpKind.SAMPLE and (failure is None or request.seq_id > 0),
        "finished_at": None if failure is None else now,
        "error": None if failure is None else failure.message,
        "category": None if failure is None else failure.category.value,
        "is_transient": False,
    }


def _final_values(row: FinishedRow, number: int | None, now: float) -> Mapping[str, Any]:
    result, failure = row.outcome.result, row.outcome.failure
    return {
        "of_row_id": row.row_id,
        "state": RequestState.DONE.value if row.is_done else RequestState.FAILED.value,
        "finished_at": now,
        "finished_order": number,
        "result_bytes": None if result is None else len(result.body),
        "error": None if failure is None else failure.message,
        "category": None if failure is None else failure.category.value,
        "is_transient": row.outcome.is_transient,
        "payload_key": row.payload_key if row.keeps_payload else None,
    }


def _session_of(request: NewRequest) -> SamplingSessionId:
    assert request.sampling_session_id is not None
    return request.sampling_session_id


def _next_numbers(conn: sa.Connection, session_ids: Sequence[SamplingSessionId], now: float) -> list[int]:
    """One completion number per entry. Sessions are locked in sorted order, so two writers cannot deadlock."""
    next_number: dict[SamplingSessionId, int] = {}
    for session_id, count in sorted(Counter(session_ids).items()):
        newest = conn.execute(_TAKE_NUMBERS, {"of_session": session_id, "count": count, "now": now}).scalar_one()
        next_number[session_id] = newest - count + 1
    numbers: list[int] = []
    for session_id in session_ids:
        numbers.append(next_number[session_id])
        next_number[session_id] += 1
    return numbers
