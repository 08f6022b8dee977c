"""Sampling sessions: which weights a client samples, and the order in which its samples came back.

It refuses to know how sampling works. Invariant: positions of completions only grow, in the order of commits, so a
client that remembers the last one it saw misses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from treadle.domain.ids import BlobKey, ModelId, PoolName, RequestId, SamplingSessionId, SessionId, TenantId
from treadle.domain.limits import MAX_PAGE_ROWS, MAX_UNPAGED_ROWS
from treadle.domain.records import SamplingSessionRecord
from treadle.domain.states import RequestState
from treadle.errors import NotFound
from treadle.store.dialect import ConflictInsert, Dialect
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.request_rows import chunks
from treadle.store.tables import IS_KEPT_VERSION, AnyRow, requests, sampling_sessions
from treadle.store.writer import Writer

# A cloned sampler numbers its requests from clone * this on (tinker SDK 0.38, sampling client).
_SEQ_IDS_PER_CLONE = 1_000_000_000

_SNAPSHOT, _INFLIGHT = "snapshot", "inflight"

_COLUMNS = (
    sampling_sessions.c.sampling_session_id,
    sampling_sessions.c.session_id,
    sampling_sessions.c.tenant_id,
    sampling_sessions.c.pool,
    sampling_sessions.c.base_model,
    sampling_sessions.c.created_at,
    sampling_sessions.c.model_path,
    sampling_sessions.c.blob_key,
    sampling_sessions.c.model_id,
    sampling_sessions.c.seq_id,
    sampling_sessions.c.is_dropped,
    sampling_sessions.c.kind,
)
_GET = sa.select(*_COLUMNS).where(sampling_sessions.c.sampling_session_id == sa.bindparam("id"))
_OF_SESSION = (
    sa.select(*_COLUMNS)
    .where(sampling_sessions.c.session_id == sa.bindparam("of_session"))
    .order_by(sampling_sessions.c.created_at, sampling_sessions.c.sampling_session_id)
    .limit(MAX_UNPAGED_ROWS)
)
_NEWEST_VERSION = (
    sa.select(*_COLUMNS)
    .where(
        sampling_sessions.c.model_id == sa.bindparam("of_model"),
        IS_KEPT_VERSION,
        sampling_sessions.c.kind == _INFLIGHT,
        sampling_sessions.c.seq_id >= sa.bindparam("from_seq_id"),
    )
    .order_by(sampling_sessions.c.seq_id.desc())
    .limit(1)
)
_COUNT_CLIENT = (
    sampling_sessions.update()
    .where(sampling_sessions.c.sampling_session_id == sa.bindparam("id"))
    .values(client_counter=sampling_sessions.c.client_counter + 1)
    .returning(sampling_sessions.c.client_counter)
)
_COUNTERS = sa.select(sampling_sessions.c.sampling_session_id, sampling_sessions.c.finished_counter).where(
    sampling_sessions.c.sampling_session_id.in_(sa.bindparam("ids", expanding=True))
)
COMPLETIONS = (
    sa.select(requests.c.finished_order, requests.c.request_id, requests.c.state, requests.c.result_bytes)
    .where(
        requests.c.sampling_session_id == sa.bindparam("of_session"),
        requests.c.finished_order > sa.bindparam("after"),
        requests.c.seq_id >= sa.bindparam("first_seq_id"),
        requests.c.seq_id < sa.bindparam("stop_seq_id"),
    )
    .order_by(requests.c.finished_order)
    .limit(sa.bindparam("max_rows"))
)


class Completion(NamedTuple):
    """A finished sample. `result_bytes` is None for a failed one."""

    position: int
    request_id: RequestId
    state: RequestState
    result_bytes: int | None


class SamplingInserts:
    """Insert sampling sessions inside a write transaction; the first one under an id stays."""

    def __init__(self, dialect: Dialect) -> None:
        self._statement: ConflictInsert = dialect.insert(sampling_sessions).on_conflict_do_nothing(
            index_elements=[sampling_sessions.c.sampling_session_id]
        )

    def insert(self, conn: sa.Connection, records: tuple[SamplingSessionRecord, ...]) -> None:
        """Idempotent by sampling_session_id."""
        if records:
            conn.execute(self._statement, [_row_of(record) for record in records])


class Sampling:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, inserts: SamplingInserts) -> None:
        self._database = database
        self._writer = writer
        self._inserts = inserts

    async def create(self, record: SamplingSessionRecord) -> SamplingSessionRecord:
        """The sampling session under this id: this one, or the first one on a replay."""

        def write(conn: sa.Connection) -> SamplingSessionRecord:
            self._inserts.insert(conn, (record,))
            return _record_of(conn.execute(_GET, {"id": record.sampling_session_id}).one())

        return await self._writer.run(write)

    async def get(self, sampling_session_id: SamplingSessionId) -> SamplingSessionRecord | None:
        """The sampling session."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": sampling_session_id}).one_or_none())
        return None if row is None else _record_of(row)

    async def newest_version(self, model_id: ModelId, *, from_seq_id: int) -> SamplingSessionRecord | None:
        """The newest version that a run published for its inflight clients by op `from_seq_id` or later, if kept."""
        values = {"of_model": model_id, "from_seq_id": from_seq_id}
        row = await self._database.read(lambda conn: conn.execute(_NEWEST_VERSION, values).one_or_none())
        return None if row is None else _record_of(row)

    async def of_session(self, session_id: SessionId) -> list[SamplingSessionRecord]:
        """A session's sampling sessions, oldest first, at most MAX_UNPAGED_ROWS."""
        rows = await self._database.read(lambda conn: conn.execute(_OF_SESSION, {"of_session": session_id}).all())
        return [_record_of(row) for row in rows]

    async def next_client_counter(self, sampling_session_id: SamplingSessionId) -> int:
        """1 for the first client that joins, then 2, and so on. Raises NotFound for an unknown id."""
        values = {"id": sampling_session_id}
        counter: int | None = await self._writer.run(lambda conn: conn.execute(_COUNT_CLIENT, values).scalar())
        if counter is None:
            raise NotFound(f"sampling session {sampling_session_id} does not exist")
        return counter

    async def newest_positions(self, ids: Sequence[SamplingSessionId]) -> dict[SamplingSessionId, int]:
        """The position of the newest completion of each of these sessions that exists; 0 without one."""

        def counters(conn: sa.Connection) -> dict[SamplingSessionId, int]:
            rows = (row for chunk in chunks(ids) for row in conn.execute(_COUNTERS, {"ids": chunk}))
            return {SamplingSessionId(id_): counter for id_, counter in rows}

        return await self._database.read(counters)

    async def completions(
        self,
        sampling_session_id: SamplingSessionId,
        *,
        after: int,
        cloned_sampler_id: int = 0,
        limit: int = MAX_PAGE_ROWS,
    ) -> list[Completion]:
        """One clone's finished samples behind position `after` (0 = from the start), in completion order."""
        values = {
            "of_session": sampling_session_id,
            "after": after,
            "first_seq_id": cloned_sampler_id * _SEQ_IDS_PER_CLONE,
            "stop_seq_id": (cloned_sampler_id + 1) * _SEQ_IDS_PER_CLONE,
            "max_rows": checked_limit(limit),
        }
        rows = await self._database.read(lambda conn: conn.execute(COMPLETIONS, values).all())
        return [Completion(place, RequestId(id_), RequestState(state), size) for place, id_, state, size in rows]


def _row_of(record: SamplingSessionRecord) -> dict[str, Any]:
    return {
        "sampling_session_id": record.sampling_session_id,
        "session_id": record.session_id,
        "tenant_id": record.tenant_id,
        "pool": record.pool,
        "base_model": record.base_model,
        "created_at": record.created_at,
        "model_path": record.model_path,
        "blob_key": record.blob_key,
        "model_id": record.model_id,
        "seq_id": record.seq_id,
        "is_dropped": record.is_dropped,
        "kind": _INFLIGHT if record.is_inflight else _SNAPSHOT,
        "last_used_at": record.created_at,
        "client_counter": 0,
        "finished_counter": 0,
    }


def _record_of(row: AnyRow) -> SamplingSessionRecord:
    return SamplingSessionRecord(
        sampling_session_id=SamplingSessionId(row.sampling_session_id),
        session_id=SessionId(row.session_id),
        tenant_id=TenantId(row.tenant_id),
        pool=PoolName(row.pool),
        base_model=row.base_model,
        created_at=row.created_at,
        model_path=row.model_path,
        blob_key=None if row.blob_key is None else BlobKey(row.blob_key),
        model_id=None if row.model_id is None else ModelId(row.model_id),
        seq_id=row.seq_id,
        is_dropped=row.is_dropped,
        is_inflight=row.kind == _INFLIGHT,
    )
