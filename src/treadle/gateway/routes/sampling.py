"""Sampling sessions and samples. A sampling session names the weights; a sample is a request of it."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import (
    CheckpointKind,
    SamplingSessionId,
    sample_request_id,
    sample_sequence_ids,
    sampler_id,
)
from treadle.domain.ops import OpKind
from treadle.domain.records import CheckpointRecord, NewRequest, SamplingSessionRecord
from treadle.errors import InvalidRequest, NotFound, UnreadableBody
from treadle.gateway.admission import Draft, sample_draft
from treadle.gateway.answers import json_response
from treadle.gateway.auth import Principal
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.checkpoints import readable_checkpoint
from treadle.gateway.context import Gateway, check_takes_new, gateway_of
from treadle.gateway.deps import PoolView
from treadle.gateway.intake import future_of, pool_limits, read_plain_body
from treadle.gateway.routing import Resource
from treadle.wire.answers import ErrorAnswer, FutureAnswer
from treadle.wire.answers_sampling import JoinAnswer, SamplerAnswer, SamplingSessionAnswer
from treadle.wire.bodies import (
    CreateSamplingSessionBody,
    JoinSamplingSessionBody,
    SampleBody,
    parse_body,
    read_op_head,
)
from treadle.wire.ops import sample_op

router = Resource("/api/v1")

# The SDK does not check which kind it passes on, and its own example uses a training checkpoint (protocol trap 20).
SAMPLEABLE = (CheckpointKind.SAMPLER, CheckpointKind.TRAINING)


@router.post(
    "/create_sampling_session", body=CreateSamplingSessionBody, answer=SamplingSessionAnswer, others={410: ErrorAnswer}
)
async def create_sampling_session(request: Request) -> Response:
    """A sampling session `{session}:sample:{n}` over a base model or a checkpoint; a replay gets the first one."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    body = parse_body(CreateSamplingSessionBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    session = await gateway.access.active_session(principal, body.session_id)
    pool, checkpoint = await _weights_of(gateway, principal, body)
    sampling_session_id = sampler_id(session.session_id, body.sampling_session_seq_id)
    if await gateway.store.sampling.get(sampling_session_id) is None:
        check_takes_new(pool)
    record = SamplingSessionRecord(
        sampling_session_id=sampling_session_id,
        session_id=session.session_id,
        tenant_id=session.tenant_id,
        pool=pool.name,
        base_model=pool.name,
        created_at=gateway.deps.clock.now(),
        model_path=None if checkpoint is None else checkpoint.tinker_path,
        blob_key=None if checkpoint is None else checkpoint.blob_key,
        model_id=None if checkpoint is None else checkpoint.model_id,
    )
    first = await gateway.store.sampling.create(record)
    return json_response({"sampling_session_id": first.sampling_session_id})


@router.post("/join_sampling_session", body=JoinSamplingSessionBody, answer=JoinAnswer)
async def join_sampling_session(request: Request) -> Response:
    """A number that tells this client from the others of the same sampling session; 0 is the one that made it."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(JoinSamplingSessionBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    record = await gateway.access.sampling_session(principal, body.sampling_session_id)
    counter = await gateway.store.sampling.next_client_counter(record.sampling_session_id)
    return json_response({"client_counter": counter})


@router.get("/samplers/{sampling_session_id}", answer=SamplerAnswer)
async def get_sampler(request: Request, sampling_session_id: str) -> Response:
    """Which weights a sampling session samples."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    record = await gateway.access.sampling_session(principal, SamplingSessionId(sampling_session_id))
    body = {"sampler_id": record.sampling_session_id, "base_model": record.base_model}
    if record.model_path is not None:
        body["model_path"] = record.model_path
    return json_response(body)


@router.post("/asample", body=SampleBody, answer=FutureAnswer, others={410: ErrorAnswer, 429: ErrorAnswer})
async def asample(request: Request) -> Response:
    """A sample. Its sequence ids are known now, since they follow from the request's id (SDK 0.26 insists on them).

    One of an inflight session takes the newest weights that its run has published by now, and keeps them whatever is
    published later: which ones these are is part of the stored request.
    """
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    async with gateway.quotas.entering(principal.tenant_id):
        return await _admitted(gateway, principal, request)


async def _admitted(gateway: Gateway, principal: Principal, request: Request) -> Response:
    raw = await read_plain_body(gateway, request)
    head = await gateway.admission.run(lambda: read_op_head(raw), num_bytes=len(raw))
    if head.sampling_session_id is None or head.seq_id is None:
        if head.sampling_session_id is None:
            raise UnreadableBody(
                "sampling_session_id is missing; base_model and model_path alone are not sampled here: name them to "
                "create_sampling_session and sample the session that it answers with"
            )
        raise UnreadableBody("seq_id is missing")
    sampler = await gateway.access.sampling_session(principal, head.sampling_session_id)
    await gateway.access.active_session(principal, sampler.session_id)
    pool = gateway.deps.pools.by_name(sampler.pool)
    limits = pool_limits(gateway, principal.tenant_id, pool)
    weights = await _newest_weights(gateway, sampler)
    # Refused requests have sequences too, as far as their number can be read.
    num_samples = 1

    def draft() -> Draft:
        nonlocal num_samples
        num_samples = _num_samples_asked(raw, gateway.settings.max_num_samples)
        if weights is None:
            raise InvalidRequest(
                f"the weights of sampling session {sampler.sampling_session_id} are no longer kept; sample a newer "
                "version, or save weights under a name to keep them"
            )
        body = parse_body(SampleBody, raw)
        if body.num_samples > gateway.settings.max_num_samples:
            raise InvalidRequest(
                f"num_samples={body.num_samples} is over this server's limit of {gateway.settings.max_num_samples}"
            )
        if limits is None:
            raise NotFound(f"base model {sampler.base_model!r} of {sampler.sampling_session_id} is not served now")
        _check_names(gateway, body, sampler)
        op = sample_op(body, blob_key=weights.blob_key, limits=limits, draw_seed=gateway.deps.draw_seed)
        return sample_draft(op, max_context_length=limits.max_context_length)

    place = _sample_place(sampler, head.seq_id, weights=weights)
    request_id = await gateway.admission.submit(place, draft, num_bytes=len(raw))
    return future_of(request_id, sample_sequence_ids=sample_sequence_ids(request_id, num_samples))


async def _weights_of(
    gateway: Gateway, principal: Principal, body: CreateSamplingSessionBody
) -> tuple[PoolView, CheckpointRecord | None]:
    """The pool, and the checkpoint unless the bare base model is meant. Both at once must agree."""
    if body.model_path is None:
        assert body.base_model is not None, "the body names weights"
        return gateway.pool_for(body.base_model), None
    checkpoint = await readable_checkpoint(gateway.access, principal, body.model_path, kinds=SAMPLEABLE)
    pool = gateway.pool_for(checkpoint.base_model)
    if body.base_model is not None and gateway.pool_for(body.base_model) != pool:
        raise InvalidRequest(f"{body.model_path} belongs to base model {pool.name}, not to {body.base_model!r}")
    return pool, checkpoint


async def _newest_weights(gateway: Gateway, sampler: SamplingSessionRecord) -> SamplingSessionRecord | None:
    """The sampling session whose weights a sample takes that comes now; None when they are no longer kept."""
    if not sampler.is_inflight:
        return None if sampler.is_dropped else sampler
    assert sampler.model_id is not None, "a run's save made it"
    assert sampler.seq_id is not None, "a run's save made it"
    return await gateway.store.sampling.newest_version(sampler.model_id, from_seq_id=sampler.seq_id)


def _check_names(gateway: Gateway, body: SampleBody, sampler: SamplingSessionRecord) -> None:
    """Raises a UserError when a sample names other weights than its session has."""
    if body.model_path is not None and body.model_path != sampler.model_path:
        raise InvalidRequest(
            f"model_path {body.model_path[:200]!r} is not what {sampler.sampling_session_id} samples "
            f"({sampler.model_path or 'weights without a name'}); leave it out, or create a sampling session for it"
        )
    if body.base_model is not None and gateway.pool_for(body.base_model).name != sampler.pool:
        raise InvalidRequest(
            f"base_model {body.base_model[:200]!r} is not what {sampler.sampling_session_id} samples "
            f"({sampler.base_model}); leave it out, or create a sampling session for it"
        )


def _sample_place(sampler: SamplingSessionRecord, seq_id: int, *, weights: SamplingSessionRecord | None) -> NewRequest:
    weights_id = None if weights is None else weights.sampling_session_id
    return NewRequest(
        request_id=sample_request_id(sampler.sampling_session_id, seq_id),
        tenant_id=sampler.tenant_id,
        pool=sampler.pool,
        kind=OpKind.SAMPLE,
        seq_id=seq_id,
        num_tokens=0,
        sampling_session_id=sampler.sampling_session_id,
        weights_id=None if weights_id == sampler.sampling_session_id else weights_id,
    )


def _num_samples_asked(raw: bytes, limit: int) -> int:
    """How many sequences a body asks for, 1 when that cannot be read or is out of bounds."""
    try:
        asked = orjson.loads(raw).get("num_samples")
    except (orjson.JSONDecodeError, AttributeError):
        return 1
    return asked if type(asked) is int and 1 <= asked <= limit else 1
