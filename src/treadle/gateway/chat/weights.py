"""Which weights a request of these forms samples, by the name in its `model`, and the sampling session it runs in.

A name is a base model's, a tinker:// path, or both joined by ";" when they agree. Sampling sessions are made when they
are first needed, one per tenant and set of weights, in a session of the tenant's own that is listed like any other.
Invariant: two requests for the same weights of one tenant share a sampling session, whichever gateways they meet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from treadle.domain.ids import CheckpointKind, SessionId, new_session_id, sampler_id
from treadle.domain.outcome import PoolFacts
from treadle.domain.records import CheckpointRecord, SamplingSessionRecord, SessionRecord
from treadle.domain.states import SessionState
from treadle.errors import InvalidRequest, NotFound, ServerError, SessionFinished
from treadle.gateway.auth import Principal
from treadle.gateway.checkpoints import readable_checkpoint
from treadle.gateway.context import Gateway, check_takes_new, loaded_facts
from treadle.gateway.deps import PoolView

# Tells these sessions from those that clients make; a later one is made when a client has finished the ones before.
SESSION_NAME = "OpenAI and Anthropic API"
_KEY = "treadle/text-api/"
# Sessions that a tenant may have finished, and sampling sessions whose number is taken, before this gives up.
_MAX_TRIES = 1_000
_KINDS = (CheckpointKind.SAMPLER, CheckpointKind.TRAINING)


@dataclass(frozen=True, slots=True)
class Weights:
    """What a request samples. checkpoint None is the bare base model."""

    name: str
    pool: PoolView
    facts: PoolFacts
    checkpoint: CheckpointRecord | None


async def find_weights(gateway: Gateway, principal: Principal, name: str) -> Weights:
    """The weights that `name` stands for, if the caller may use them.

    Raises NotFound for what is not there, InvalidRequest for a malformed path or two names that disagree, PoolLoading.
    """
    base_model, separator, path = name.rpartition(";")
    if not separator and "://" not in name:
        base_model, path = name, ""
    if not path:
        pool = gateway.pool_for(base_model)
        return Weights(name, pool, loaded_facts(pool), None)
    checkpoint = await readable_checkpoint(gateway.access, principal, path, kinds=_KINDS)
    pool = gateway.pool_for(checkpoint.base_model)
    if base_model and gateway.pool_for(base_model) != pool:
        raise InvalidRequest(f"{path} belongs to base model {pool.name}, not to {base_model!r}")
    return Weights(name, pool, loaded_facts(pool), checkpoint)


async def sampling_session_of(gateway: Gateway, principal: Principal, weights: Weights) -> SamplingSessionRecord:
    """The sampling session of these weights, made now if there is none."""
    session_id = await _session_of(gateway, principal)
    checkpoint = weights.checkpoint
    blob_key = None if checkpoint is None else checkpoint.blob_key
    first = _number(weights.pool.name, blob_key)
    for number in range(first, first + _MAX_TRIES):
        sampling_session_id = sampler_id(session_id, number)
        try:
            record = await gateway.access.sampling_session(principal, sampling_session_id)
        except NotFound:
            check_takes_new(weights.pool)
            record = await gateway.store.sampling.create(
                SamplingSessionRecord(
                    sampling_session_id=sampling_session_id,
                    session_id=session_id,
                    tenant_id=principal.tenant_id,
                    pool=weights.pool.name,
                    base_model=weights.pool.name,
                    created_at=gateway.deps.clock.now(),
                    model_path=None if checkpoint is None else checkpoint.tinker_path,
                    blob_key=blob_key,
                    model_id=None if checkpoint is None else checkpoint.model_id,
                )
            )
        if (record.pool, record.blob_key, record.is_dropped) == (weights.pool.name, blob_key, False):
            return record
    raise ServerError("no sampling session could be made for these weights")


async def _session_of(gateway: Gateway, principal: Principal) -> SessionId:
    """The tenant's open session for these forms."""
    tenant_id = principal.tenant_id
    for count in range(gateway.text_sessions.num_finished(tenant_id), _MAX_TRIES):
        known = gateway.text_sessions.get(tenant_id)
        if known is None:
            now = gateway.deps.clock.now()
            record = SessionRecord(
                session_id=new_session_id(),
                tenant_id=tenant_id,
                state=SessionState.ACTIVE,
                created_at=now,
                last_heartbeat_at=now,
                display_name=SESSION_NAME,
            )
            known = (await gateway.store.sessions.create(record, idempotency_key=f"{_KEY}{count}")).session_id
            gateway.text_sessions.put(tenant_id, known)
        try:
            return (await gateway.access.active_session(principal, known)).session_id
        except (SessionFinished, NotFound):
            gateway.text_sessions.finished(tenant_id, count + 1)
    raise ServerError("no session could be made for this request")


def _number(pool: str, blob_key: str | None) -> int:
    """A number that these weights alone have, as good as certainly; below 2**48."""
    return int.from_bytes(hashlib.sha256(f"{pool}\n{blob_key or ''}".encode()).digest()[:6])
