"""Sequences that were sampled with record_stability_info, for the passes of their session that train on them.

It refuses to know what a loss makes of them. Invariants: a record becomes visible together with the result of its
sample; it is found by its own session alone; it stays for as long as passes use it, and a day longer (retention).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import SessionId, sample_sequence_ids
from treadle.domain.limits import MAX_ROWS_PER_SWEEP, MAX_STABILITY_BYTES_PER_PASS
from treadle.domain.stability import RecordedSequence
from treadle.errors import InvalidRequest
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.request_rows import FinishedRow, chunks
from treadle.store.tables import sampling_sessions, stability_records
from treadle.store.writer import Writer

# A use is noted once in so many seconds: a step's passes often share their sequences' groups.
_NOTED_EVERY_S = 60.0

_r = stability_records.c
_ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_SESSIONS = sa.select(sampling_sessions.c.sampling_session_id, sampling_sessions.c.session_id).where(
    sampling_sessions.c.sampling_session_id.in_(_ids)
)
_IS_OWN = sa.and_(_r.sequence_id.in_(_ids), _r.session_id == sa.bindparam("of_session"))
# Of the tokens alone; the log-probabilities are as long.
_NUM_BYTES = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(_r.tokens)), 0)).where(_IS_OWN)
_GET = sa.select(_r.sequence_id, _r.tokens, _r.logprobs, _r.num_prompt_tokens).where(_IS_OWN)
_NOTE_USE = (
    stability_records.update()
    .where(_IS_OWN, _r.last_used_at < sa.bindparam("noted_before", type_=sa.Double))
    .values(last_used_at=sa.bindparam("now", type_=sa.Double))
)
_is_unused = _r.last_used_at < sa.bindparam("before", type_=sa.Double)
_FORGET = stability_records.delete().where(
    # Twice: one that a pass uses at this moment is looked at once more, but by the outer one alone.
    _is_unused,
    _r.sequence_id.in_(sa.select(_r.sequence_id).where(_is_unused).limit(MAX_ROWS_PER_SWEEP)),
)


class RecordUpserts:
    """Keep recorded sequences inside a write transaction."""

    def __init__(self, dialect: Dialect) -> None:
        insert = dialect.insert(stability_records)
        replaced = {column.name: insert.excluded[column.name] for column in _r if not column.primary_key}
        # A number may be sampled again when its row was swept, and then its record may still be in use.
        self._statement = insert.on_conflict_do_update(index_elements=[_r.sequence_id], set_=replaced)

    def upsert(self, conn: sa.Connection, rows: Sequence[FinishedRow], now: float) -> None:
        """Keep the recorded sequences of samples that became final in this transaction."""
        recording = [row for row in rows if row.outcome.recorded]
        if not recording:
            return
        samplers = sorted({row.sampling_session_id for row in recording if row.sampling_session_id is not None})
        session_of: dict[str | None, str] = {
            row.sampling_session_id: row.session_id for row in conn.execute(_SESSIONS, {"ids": samplers})
        }
        conn.execute(
            self._statement,
            [
                {
                    "sequence_id": sequence_id,
                    "session_id": session_of[row.sampling_session_id],
                    "tenant_id": row.tenant_id,
                    "last_used_at": now,
                    "num_prompt_tokens": record.num_prompt_tokens,
                    "tokens": record.tokens,
                    "logprobs": record.logprobs,
                }
                for row in recording
                for sequence_id, record in zip(
                    sample_sequence_ids(row.request_id, len(row.outcome.recorded)), row.outcome.recorded, strict=True
                )
            ],
        )


class StabilityRecords:
    """See the module."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock

    async def use(self, session_id: SessionId, sequence_ids: Collection[str]) -> dict[str, RecordedSequence]:
        """Those of these sequences that the session has on record, by id; their day of keeping starts anew.

        Raises InvalidRequest when they are more than one pass may read.
        """
        ids = sorted(set(sequence_ids))
        found = await self._database.read(lambda conn: _records(conn, session_id, ids))
        if found:
            now = self._clock()
            values = {"of_session": session_id, "noted_before": now - _NOTED_EVERY_S, "now": now}
            used = sorted(found)

            def note(conn: sa.Connection) -> None:
                for chunk in chunks(used):
                    conn.execute(_NOTE_USE, {"ids": chunk, **values})

            await self._writer.run(note)
        return found

    async def forget(self, *, unused_since: float) -> int:
        """Remove records that no pass used since then; how many. At most MAX_ROWS_PER_SWEEP."""
        return await self._writer.run(lambda conn: conn.execute(_FORGET, {"before": unused_since}).rowcount)


def _records(conn: sa.Connection, session_id: SessionId, ids: Sequence[str]) -> dict[str, RecordedSequence]:
    found: dict[str, RecordedSequence] = {}
    num_bytes = 0
    for chunk in chunks(ids):
        values = {"ids": chunk, "of_session": session_id}
        num_bytes += 2 * conn.execute(_NUM_BYTES, values).scalar_one()
        if num_bytes > MAX_STABILITY_BYTES_PER_PASS:
            raise InvalidRequest(
                f"the recorded sequences that this request names have over {MAX_STABILITY_BYTES_PER_PASS} bytes; "
                "send fewer datums in a request"
            )
        for sequence_id, tokens, logprobs, num_prompt_tokens in conn.execute(_GET, values):
            found[sequence_id] = RecordedSequence(bytes(tokens), bytes(logprobs), num_prompt_tokens)
    return found
