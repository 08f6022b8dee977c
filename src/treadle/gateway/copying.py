"""Copies of checkpoints for their readers: where a copy goes, and under which name it comes again.

It refuses to judge who may read the source. Invariant: the copy's path follows from the source and from either the
caller's session and number or the caller's idempotency key, so a retry finds what the first try made.
"""

from __future__ import annotations

from dataclasses import replace

from treadle.domain.ids import SessionId, TinkerPath, new_session_id, training_model_id
from treadle.domain.limits import MAX_ID_CHARS
from treadle.domain.records import CheckpointRecord, ModelRecord, SessionRecord
from treadle.domain.states import ModelState, SessionState
from treadle.errors import InvalidRequest
from treadle.gateway.auth import Principal
from treadle.gateway.context import Gateway
from treadle.store.quotas import SaveLimits
from treadle.wire.checkpoints import CopyWeightsBody

# Keeps the keys of copies apart from those of sessions, which are looked up in the same place.
_KEY_PREFIX = "copy_weights:"


async def copy_checkpoint(
    gateway: Gateway,
    principal: Principal,
    source: CheckpointRecord,
    body: CopyWeightsBody,
    *,
    idempotency_key: str | None,
) -> str:
    """The path of the copy: a row that shares the blob, under a run that cannot be trained.

    Raises InvalidRequest when the run's place is taken, NotFound when the source or the session is gone, and Forbidden
    for a shared project that the caller takes no part in.
    """
    await gateway.access.check_project(principal, body.destination_project_id)
    if body.session_id is not None:
        assert body.model_seq_id is not None
        session = await gateway.access.active_session(principal, body.session_id)
        return await _add(gateway, principal, source, body, session.session_id, model_seq_id=body.model_seq_id)
    session = await _session_of_copy(gateway, principal, source, body, idempotency_key)
    try:
        return await _add(gateway, principal, source, body, session.session_id, model_seq_id=0)
    finally:
        # Nobody will send a heartbeat.
        await gateway.store.sessions.finish(session.session_id, "success")


async def _session_of_copy(
    gateway: Gateway, principal: Principal, source: CheckpointRecord, body: CopyWeightsBody, key: str | None
) -> SessionRecord:
    """A session of the copy's own, in the project that it goes to; the first one for a key that was used before."""
    if key is not None and ("\0" in key or len(key) > MAX_ID_CHARS):
        raise InvalidRequest(f"X-Idempotency-Key has over {MAX_ID_CHARS} characters, or a NUL")
    now = gateway.deps.clock.now()
    record = SessionRecord(
        session_id=new_session_id(),
        tenant_id=principal.tenant_id,
        state=SessionState.ACTIVE,
        created_at=now,
        last_heartbeat_at=now,
        project_id=body.destination_project_id,
        user_metadata={"created_by": "copy_weights", "source_path": source.tinker_path},
    )
    first = await gateway.store.sessions.create(record, None if key is None else _KEY_PREFIX + key)
    if first.user_metadata != record.user_metadata or first.project_id != record.project_id:
        raise InvalidRequest("X-Idempotency-Key was used for another copy; send a new one")
    return first


async def _add(
    gateway: Gateway,
    principal: Principal,
    source: CheckpointRecord,
    body: CopyWeightsBody,
    session_id: SessionId,
    *,
    model_seq_id: int,
) -> str:
    now = gateway.deps.clock.now()
    trained = await gateway.store.models.get(source.model_id)
    assert trained is not None, "a checkpoint has a run"
    run = ModelRecord(
        model_id=training_model_id(session_id, model_seq_id),
        session_id=session_id,
        tenant_id=principal.tenant_id,
        pool=trained.pool,
        base_model=source.base_model,
        revision=trained.revision,
        lora=source.lora,
        state=ModelState.UNLOADED,
        state_message=f"it holds a copy of {source.tinker_path} and cannot be trained; create a run from the copy",
        # Nothing is waited for, not even its creation.
        next_seq_id=1,
        created_at=now,
        last_request_at=now,
    )
    copy = replace(
        source,
        model_id=run.model_id,
        tenant_id=run.tenant_id,
        tinker_path=str(TinkerPath(run.model_id, source.kind, source.name)),
        created_at=now,
        public=False,
        expires_at=None if body.ttl_seconds is None else now + body.ttl_seconds,
        copied_from=source.tinker_path,
    )
    limits = SaveLimits.of(gateway.policies.now, run.tenant_id)
    await gateway.store.copies.add(run, copy, limits=limits)
    return copy.tinker_path
