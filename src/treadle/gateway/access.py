"""Whose is it: ids from requests become rows that the caller owns, or that a shared project lets it read.

A foreign id and an unknown one are answered alike, so that ids cannot be probed. What never changes about a
row (its owner, session, pool, shape) is remembered; a session's state is believed for SESSION_CACHE_S, and that it is
shared as long (sharing.py). What is a tenant's own costs no question about sharing.
Invariant: nothing leaves this file that does not belong to the caller's tenant, but what the route asked for
`with_shared` and a project that both are in shares.
"""

from __future__ import annotations

from treadle.domain.ids import (
    PROJECT_PREFIX,
    LossId,
    ModelId,
    SamplingSessionId,
    SessionId,
    TenantId,
    TinkerPath,
    session_of_run,
)
from treadle.domain.limits import MAX_SEQ_ID_LEAD
from treadle.domain.records import (
    CheckpointRecord,
    CustomLossRecord,
    ModelRecord,
    SamplingSessionRecord,
    SessionRecord,
)
from treadle.domain.states import SessionState
from treadle.errors import Forbidden, NotFound, SessionFinished
from treadle.gateway.auth import Principal
from treadle.gateway.caches import ConfirmedRows, RecentRows
from treadle.gateway.deps import Clock
from treadle.gateway.sharing import Sharing
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
        self._sharing = Sharing(store=store, clock=clock)

    async def session(self, principal: Principal, session_id: SessionId, *, with_shared: bool = False) -> SessionRecord:
        """The caller's session in whatever state; with_shared: or one that it may read. Raises NotFound."""
        record = await self._store.sessions.get(session_id)
        if record is None or not await self._may_read(principal, record.tenant_id, session_id, with_shared=with_shared):
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

    async def model(self, principal: Principal, model_id: ModelId, *, with_shared: bool = False) -> ModelRecord:
        """The caller's run as it is now; with_shared: or one that it may read. Raises NotFound."""
        record = await self._store.models.get(model_id)
        if record is None or not await self._may_read(
            principal, record.tenant_id, record.session_id, with_shared=with_shared
        ):
            raise NotFound(f"model {model_id[:80]!r} does not exist")
        if record.tenant_id == principal.tenant_id:
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

    async def checkpoint(
        self, principal: Principal, path: TinkerPath, *, on_behalf_of: Principal | None = None
    ) -> CheckpointRecord | None:
        """The live checkpoint at `path` if it is the caller's, published, shared with the caller, or of whoever gave
        the caller an access token; else None."""
        record = await self._store.checkpoints.find(str(path))
        if record is None or await self.may_read_checkpoint(principal.tenant_id, record):
            return record
        return record if on_behalf_of is not None and record.tenant_id == on_behalf_of.tenant_id else None

    async def may_read_checkpoint(self, reader: TenantId, record: CheckpointRecord) -> bool:
        """Whether it is the reader's own, published, or shared with the reader now."""
        if record.tenant_id == reader or record.public:
            return True
        return await self.is_shared(reader, session_of_run(record.model_id))

    async def is_shared(self, reader: TenantId, session_id: SessionId) -> bool:
        """Whether a project shares this session, which is not the reader's, with the reader now."""
        return await self._sharing.is_shared(reader, session_id)

    def sharing_changed(self) -> None:
        """This gateway just changed who shares what: nothing that was remembered of it counts any more."""
        self._sharing.changed()

    async def check_project(self, principal: Principal, project_id: str | None) -> None:
        """Raises Forbidden unless the caller may put things there: a name of its own, or a project that it takes part
        in. A project that is not there and one of others are refused in the same words."""
        if project_id is None or not project_id.startswith(PROJECT_PREFIX):
            return
        if not await self._store.projects.takes_part(principal.tenant_id, project_id):
            raise Forbidden(
                f"you have no access to project {project_id[:200]!r}: ask its owner to add you, or choose a name that "
                "does not begin like the id of a shared project"
            )

    async def _may_read(
        self, principal: Principal, owner: TenantId, session_id: SessionId, *, with_shared: bool
    ) -> bool:
        if owner == principal.tenant_id:
            return True
        return with_shared and await self.is_shared(principal.tenant_id, session_id)
