"""Whose is it: ids from requests become rows that the caller owns.

A foreign id and an unknown one are answered alike, so that ids cannot be probed. What never changes about a
row (its owner, session, pool, shape) is remembered; a session's state is believed for SESSION_CACHE_S.
Invariant: nothing leaves this file that does not belong to the caller's tenant.
"""

from __future__ import annotations

from treadle.domain.ids import LossId, ModelId, SamplingSessionId, SessionId
from treadle.domain.limits import MAX_SEQ_ID_LEAD
from treadle.domain.records import CustomLossRecord, ModelRecord, SamplingSessionRecord, SessionRecord
from treadle.domain.states import SessionState
from treadle.errors import NotFound, SessionFinished
from treadle.gateway.auth import Principal
from treadle.gateway.caches import ConfirmedRows, RecentRows
from treadle.gateway.deps import Clock
from treadle.store import Store

# Another gateway may finish a session; until then work for it is accepted for at most this long.
SESSION_CACHE_S = 1.0
# Rows remembered per kind, least recently used first out; about 1 KB each, 17 KB with the largest metadata.
MAX_CACHED_ROWS = 8_192
# Custom losses remembered, up to 64 KB each.
MAX_CACHED_LOSSES = 256


class Access:
    """Looks rows up for a principal."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._sessions: ConfirmedRows[SessionId, SessionRecord] = ConfirmedRows(
            capacity=MAX_CACHED_ROWS, lifetime_s=SESSION_CACHE_S, clock=clock, ended=store.sessions.finished_among
        )
        self._models: RecentRows[ModelId, ModelRecord] = RecentRows(MAX_CACHED_ROWS)
        self._losses: RecentRows[LossId, CustomLossRecord] = RecentRows(MAX_CACHED_LOSSES)
        self._samplers: ConfirmedRows[SamplingSessionId, SamplingSessionRecord] = ConfirmedRows(
            capacity=MAX_CACHED_ROWS, lifetime_s=SESSION_CACHE_S, clock=clock, ended=store.retention.dropped_among
        )

    async def session(self, principal: Principal, session_id: SessionId) -> SessionRecord:
        """The caller's session in whatever state. Raises NotFound."""
        record = await self._store.sessions.get(session_id)
        if record is None or record.tenant_id != principal.tenant_id:
            raise NotFound(f"session {session_id[:80]!r} does not exist")
        return record

    async def active_session(self, principal: Principal, session_id: SessionId) -> SessionRecord:
        """The caller's session, open for new work. Raises NotFound or SessionFinished."""
        cached = await self._sessions.get(session_id)
        if cached is not None and cached.tenant_id == principal.tenant_id:
            return cached
        read_at = self._clock.monotonic()
        record = await self.session(principal, session_id)
        if record.state is SessionState.FINISHED:
            raise SessionFinished(f"session {session_id} is finished; create a new session")
        self._sessions.put(session_id, record, read_at=read_at)
        return record

    def session_changed(self, session_id: SessionId) -> None:
        """This gateway just finished the session, or moved it: what was remembered of it is no longer true."""
        self._sessions.forget(session_id)

    async def model(self, principal: Principal, model_id: ModelId) -> ModelRecord:
        """The caller's run as it is now. Raises NotFound."""
        record = await self._store.models.get(model_id)
        if record is None or record.tenant_id != principal.tenant_id:
            raise NotFound(f"model {model_id[:80]!r} does not exist")
        self._models.put(model_id, record)
        return record

    async def model_of_op(self, principal: Principal, model_id: ModelId, *, seq_id: int) -> ModelRecord:
        """The run that op `seq_id` is for. Only the fields that never change may be read from the answer.

        Its next_seq_id is one that the run had once, and the newest one when the op is too far ahead of it.
        Raises NotFound.
        """
        record = self._models.get(model_id)
        if record is None or record.tenant_id != principal.tenant_id or seq_id - record.next_seq_id > MAX_SEQ_ID_LEAD:
            record = await self.model(principal, model_id)
        return record

    async def sampling_session(
        self, principal: Principal, sampling_session_id: SamplingSessionId
    ) -> SamplingSessionRecord:
        """The caller's sampling session; of its row only `is_dropped` ever changes. Raises NotFound."""
        record = await self._samplers.get(sampling_session_id)
        if record is not None and record.tenant_id == principal.tenant_id:
            return record
        read_at = self._clock.monotonic()
        record = await self._store.sampling.get(sampling_session_id)
        if record is None or record.tenant_id != principal.tenant_id:
            raise NotFound(f"sampling session {sampling_session_id[:80]!r} does not exist")
        if not record.is_dropped:
            self._samplers.put(sampling_session_id, record, read_at=read_at)
        return record

    async def custom_loss(self, principal: Principal, loss_id: LossId) -> CustomLossRecord:
        """The caller's custom loss, which never changes. Raises NotFound."""
        record = self._losses.get(loss_id) or await self._store.custom_losses.get(loss_id)
        if record is None or record.tenant_id != principal.tenant_id:
            raise NotFound(f"custom loss {loss_id[:80]!r} does not exist")
        self._losses.put(loss_id, record)
        return record
