"""Request rows inside a write transaction: how they come in and how they become final.

Shared by everything that writes requests (admission, model creation, the scheduler's commits). It refuses to know who
calls and whether a lease allows it. Invariants: a row's final state never changes; a final row has a result or an
error, and no payload; samples of one sampling session are numbered 1, 2, ... in the order of their commits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import RequestId, SamplingSessionId
from treadle.domain.limits import MAX_IDS_PER_QUERY, MAX_INLINE_PAYLOAD_BYTES
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedRequest, NewRequest
from treadle.domain.states import RequestState
from treadle.errors import InvalidRequest
from treadle.store.dialect import Dialect
from treadle.store.tables import IS_QUEUED, payloads, requests, results, sampling_sessions

_MAX_SEQ_ID = 2**63 - 1

_SELECT_QUEUED = (
    sa.select(requests.c.row_id, requests.c.request_id, requests.c.sampling_session_id)
    .where(requests.c.request_id.in_(sa.bindparam("ids", expanding=True)), IS_QUEUED)
    # Other gateways may refuse or cancel the same rows one day; SQLite has one writer and ignores this.
    .with_for_update()
)
_FINISH = (
    requests.update()
    .where(requests.c.row_id == sa.bindparam("of_row_id"))
    .values(in_line=sa.false())
    .values({name: sa.bindparam(name) for name in ("state", "finished_at", "finished_order", "result_bytes")})
    .values({name: sa.bindparam(name) for name in ("error", "category", "is_transient")})
)
_NUMBER_SAMPLE = (
    requests.update()
    .where(requests.c.row_id == sa.bindparam("of_row_id"))
    .values(finished_order=sa.bindparam("finished_order"))
)
_TAKE_NUMBERS = (
    sampling_sessions.update()
    .where(sampling_sessions.c.sampling_session_id == sa.bindparam("of_session"))
    .values(finished_counter=sampling_sessions.c.finished_counter + sa.bindparam("count"))
    .returning(sampling_sessions.c.finished_counter)
)
_INSERT_PAYLOAD = payloads.insert()
_INSERT_RESULT = results.insert()
# Nothing is replayed yet, so a payload goes with its outcome. Recovery will keep the payloads of committed ops until
# the second newest snapshot has passed them; this statement and its one use below are what changes then.
_DROP_PAYLOAD = payloads.delete().where(payloads.c.row_id == sa.bindparam("of_row_id"))


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
        refused_samples = [r for r in added if r.failure and r.sampling_session_id is not None]
        if refused_samples:
            numbers = _next_numbers(conn, [_session_of(r) for r in refused_samples])
            conn.execute(
                _NUMBER_SAMPLE,
                [
                    {"of_row_id": row_ids[r.request_id], "finished_order": number}
                    for r, number in zip(refused_samples, numbers, strict=True)
                ],
            )
        return set(row_ids)

    def finish(self, conn: sa.Connection, finished: Sequence[FinishedRequest], now: float) -> tuple[RequestId, ...]:
        """Make queued rows final; the ids of those that were. Unknown and final rows are left alone."""
        by_id = {outcome.request_id: outcome for outcome in finished}
        assert len(by_id) == len(finished), "a request ends once"
        assert all((f.result is None) != (f.failure is None) for f in finished), "one of result and failure"
        queued = self._queued_rows(conn, by_id)
        if not queued:
            return ()
        # In the order they were handed over, which is the order clients see completions in.
        ordered = [(f, *queued[f.request_id]) for f in finished if f.request_id in queued]
        sampled = [session_id for _f, _row_id, session_id in ordered if session_id is not None]
        numbers = iter(_next_numbers(conn, sampled))
        rows = [
            _final_values(outcome, row_id, next(numbers) if session_id is not None else None, now)
            for outcome, row_id, session_id in ordered
        ]
        conn.execute(_FINISH, rows)
        bodies = [
            {"row_id": row_id, "content_type": f.result.content_type, "body": f.result.body, "finished_at": now}
            for f, row_id, _session_id in ordered
            if f.result is not None
        ]
        if bodies:
            conn.execute(_INSERT_RESULT, bodies)
        conn.execute(_DROP_PAYLOAD, [{"of_row_id": row_id} for _f, row_id, _session_id in ordered])
        return tuple(f.request_id for f, _row_id, _session_id in ordered)

    def _queued_rows(
        self, conn: sa.Connection, ids: Iterable[RequestId]
    ) -> dict[RequestId, tuple[int, SamplingSessionId | None]]:
        found: dict[RequestId, tuple[int, SamplingSessionId | None]] = {}
        for chunk in chunks(list(ids)):
            for row_id, request_id, session_id in conn.execute(_SELECT_QUEUED, {"ids": chunk}):
                found[RequestId(request_id)] = (row_id, session_id)
        return found


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
        "created_at": now,
        # A refused op is stepped over in its turn; a run whose creation (seq_id 0) was refused has no line.
        "in_line": request.kind is not OpKind.SAMPLE and (failure is None or request.seq_id > 0),
        "finished_at": None if failure is None else now,
        "error": None if failure is None else failure.message,
        "category": None if failure is None else failure.category.value,
        "is_transient": False,
    }


def _final_values(outcome: FinishedRequest, row_id: int, number: int | None, now: float) -> Mapping[str, Any]:
    failure = outcome.failure
    return {
        "of_row_id": row_id,
        "state": RequestState.DONE.value if failure is None else RequestState.FAILED.value,
        "finished_at": now,
        "finished_order": number,
        "result_bytes": None if outcome.result is None else len(outcome.result.body),
        "error": None if failure is None else failure.message,
        "category": None if failure is None else failure.category.value,
        "is_transient": outcome.is_transient,
    }


def _session_of(request: NewRequest) -> SamplingSessionId:
    assert request.sampling_session_id is not None
    return request.sampling_session_id


def _next_numbers(conn: sa.Connection, session_ids: Sequence[SamplingSessionId]) -> list[int]:
    """One completion number per entry. Sessions are locked in sorted order, so two writers cannot deadlock."""
    next_number: dict[SamplingSessionId, int] = {}
    for session_id, count in sorted(Counter(session_ids).items()):
        newest = conn.execute(_TAKE_NUMBERS, {"of_session": session_id, "count": count}).scalar_one()
        next_number[session_id] = newest - count + 1
    numbers: list[int] = []
    for session_id in session_ids:
        numbers.append(next_number[session_id])
        next_number[session_id] += 1
    return numbers
