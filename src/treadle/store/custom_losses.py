"""Custom losses: what sessions registered, and the requests that registered them.

It refuses to know what a definition says. Invariants: a loss never changes, and is there from its request's end to its
session's; the first registration under a number stays, whatever a retry brings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import LossId, RequestId, SessionId, TenantId
from treadle.domain.limits import MAX_CUSTOM_LOSSES_PER_SESSION, MAX_ROWS_PER_SWEEP
from treadle.domain.outcome import EncodedResult, Failure
from treadle.domain.records import CustomLossRecord, FinishedRequest, NewRequest
from treadle.domain.states import Category
from treadle.store.dialect import ConflictInsert
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.store.request_rows import RequestRows
from treadle.store.tables import custom_losses, sessions
from treadle.store.writer import Writer

_GET = sa.select(
    custom_losses.c.loss_id,
    custom_losses.c.session_id,
    custom_losses.c.tenant_id,
    custom_losses.c.custom_loss_seq_id,
    custom_losses.c.name,
    custom_losses.c.definition,
    custom_losses.c.created_at,
).where(custom_losses.c.loss_id == sa.bindparam("id"))
_FORGET = custom_losses.delete().where(
    custom_losses.c.loss_id.in_(
        sa.select(custom_losses.c.loss_id)
        .join_from(custom_losses, sessions)
        .where(sessions.c.finished_at < sa.bindparam("before", type_=sa.Double))
        .limit(MAX_ROWS_PER_SWEEP)
    )
)
_COUNT = sa.select(sa.func.count()).where(custom_losses.c.session_id == sa.bindparam("of_session"))


class CustomLosses:
    """See the module."""

    def __init__(
        self, *, database: Database, writer: Writer, events: Events, rows: RequestRows, clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._writer = writer
        self._events = events
        self._rows = rows
        self._clock = clock
        self._insert: ConflictInsert = database.dialect.insert(custom_losses).on_conflict_do_nothing(
            index_elements=[custom_losses.c.loss_id]
        )

    async def register(self, request: NewRequest, record: CustomLossRecord, result: EncodedResult) -> None:
        """Loss and request, done with `result`, in one transaction. A retry changes nothing.

        The request fails when the session has MAX_CUSTOM_LOSSES_PER_SESSION losses.
        """
        await self._end(request, record, FinishedRequest(request.request_id, result=result))

    async def refuse(self, request: NewRequest, failure: Failure) -> None:
        """The request alone, failed. A retry changes nothing."""
        await self._end(request, None, FinishedRequest(request.request_id, failure=failure))

    async def get(self, loss_id: LossId) -> CustomLossRecord | None:
        """The loss, whoever asks."""
        row = await self._database.read(lambda conn: conn.execute(_GET, {"id": loss_id}).one_or_none())
        if row is None:
            return None
        id_, session_id, tenant_id, seq_id, name, definition, created_at = row
        return CustomLossRecord(
            loss_id=LossId(id_),
            session_id=SessionId(session_id),
            tenant_id=TenantId(tenant_id),
            custom_loss_seq_id=seq_id,
            name=name,
            definition=bytes(definition),
            created_at=created_at,
        )

    async def forget(self, *, finished_before: float) -> int:
        """Remove losses of sessions that were finished before then; how many. At most MAX_ROWS_PER_SWEEP.

        Passes carry their loss, so those that wait or are replayed do without.
        """
        return await self._writer.run(lambda conn: conn.execute(_FORGET, {"before": finished_before}).rowcount)

    async def _end(self, request: NewRequest, record: CustomLossRecord | None, outcome: FinishedRequest) -> None:
        def write(conn: sa.Connection) -> bool:
            now = self._clock()
            if request.request_id not in self._rows.insert(conn, [request], now):
                return False
            ended = outcome
            if record is not None:
                if _count(conn, record.session_id) >= MAX_CUSTOM_LOSSES_PER_SESSION:
                    ended = FinishedRequest(request.request_id, failure=_too_many(record.session_id))
                else:
                    conn.execute(self._insert, _row_of(record, now))
            self._rows.finish(conn, [ended], now)
            return True

        if await self._writer.run(write):
            self._events.announce_finished((RequestId(request.request_id),))


def _count(conn: sa.Connection, session_id: SessionId) -> int:
    count: int = conn.execute(_COUNT, {"of_session": session_id}).scalar_one()
    return count


def _too_many(session_id: SessionId) -> Failure:
    return Failure(
        message=f"session {session_id} has {MAX_CUSTOM_LOSSES_PER_SESSION} custom losses, the most that is allowed; "
        "use a loss again by its handle",
        category=Category.USER,
    )


def _row_of(record: CustomLossRecord, now: float) -> dict[str, Any]:
    return {
        "loss_id": record.loss_id,
        "session_id": record.session_id,
        "tenant_id": record.tenant_id,
        "custom_loss_seq_id": record.custom_loss_seq_id,
        "name": record.name,
        "definition": record.definition,
        "created_at": now,
    }
