"""Training ops of a run: passes, steps, saves. All are sequenced; none waits here for another."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ops import OpKind, OptimStepOp, PassOp, SaveForSamplerOp, SaveWeightsOp, kind_of
from treadle.domain.quanta import cut_quanta, quantum_tokens
from treadle.domain.records import NewRequest
from treadle.errors import InvalidRequest, NotSupported, UserError
from treadle.gateway.admission import Draft
from treadle.gateway.auth import Principal
from treadle.gateway.context import Gateway, gateway_of, loaded_facts
from treadle.gateway.intake import (
    Submission,
    answer_op,
    let_in,
    op_place,
    open_pool,
    pass_limits,
    read_plain_body,
    submit_training_op,
)
from treadle.gateway.routing import Resource
from treadle.wire.bodies import OptimStepBody, SaveForSamplerBody, SaveWeightsBody, parse_body
from treadle.wire.ops import optim_step_op, save_for_sampler_op, save_weights_op
from treadle.wire.passes import decode_pass, read_pass_head

router = Resource("/api/v1")


@router.post("/forward_backward")
async def forward_backward(request: Request) -> Response:
    """One pass, protobuf, perhaps compressed; forward-only when its body says so. Stored as the client sent it."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    if request.headers.get("content-type", "").startswith("application/json"):
        raise NotSupported("forward_backward takes protobuf; use tinker 0.25 or newer")
    await let_in(gateway, principal)
    # In a call of its own, so that an answer that is held does not hold the body in memory.
    return await answer_op(request, await _admit_pass(gateway, principal, request))


async def _admit_pass(gateway: Gateway, principal: Principal, request: Request) -> NewRequest:
    raw = await read_plain_body(gateway, request)
    head = await gateway.admission.run(lambda: read_pass_head(raw), num_bytes=len(raw))
    model = await gateway.access.model_of_op(principal, head.model_id, seq_id=head.seq_id)
    place = op_place(model, OpKind.FORWARD_BACKWARD, head.seq_id)
    try:
        pool = await open_pool(gateway, principal, model, head.seq_id)
    except UserError as refusal:
        await gateway.admission.submit_refused(place, refusal)
        return place
    limits = pass_limits(loaded_facts(pool))

    def draft() -> Draft:
        op = decode_pass(raw, limits=limits)
        if len(op.datums) > gateway.settings.max_datums_per_request:
            raise InvalidRequest(
                f"data has {len(op.datums)} datums; this server takes {gateway.settings.max_datums_per_request}"
            )
        return _pass_draft(op, raw)

    await gateway.admission.submit(place, draft, num_bytes=len(raw))
    return place


@router.post("/optim_step")
async def optim_step(request: Request) -> Response:
    """One optimiser step over the passes since the last one."""
    return await submit_training_op(request, OpKind.OPTIM_STEP, _optim_step)


@router.post("/save_weights")
async def save_weights(request: Request) -> Response:
    """A training checkpoint. Whether its name is free is decided when it runs, in seq order."""
    return await submit_training_op(request, OpKind.SAVE_WEIGHTS, _save_weights)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> Response:
    """Sampler weights, named or for a sampling session of their own.

    A retry may carry another sampling_session_seq_id (tinker 0.38); it is the first one's replay all the same.
    """
    return await submit_training_op(request, OpKind.SAVE_FOR_SAMPLER, _save_for_sampler)


async def _optim_step(submission: Submission) -> OptimStepOp:
    return optim_step_op(parse_body(OptimStepBody, submission.raw))


async def _save_weights(submission: Submission) -> SaveWeightsOp:
    return save_weights_op(parse_body(SaveWeightsBody, submission.raw))


async def _save_for_sampler(submission: Submission) -> SaveForSamplerOp:
    body = parse_body(SaveForSamplerBody, submission.raw)
    op = save_for_sampler_op(body, session_id=submission.model.session_id)
    # The first sampling session under an id stays, so this save would be answered with older weights than its own.
    # Of two saves queued under one id the later commit loses in the same way; only a client that miscounts sends them.
    if op.sampling_session_id is not None and await submission.gateway.store.sampling.get(op.sampling_session_id):
        raise InvalidRequest(f"sampling_session_seq_id={body.sampling_session_seq_id} is taken by another sampler")
    return op


def _pass_draft(op: PassOp, raw: bytes) -> Draft:
    datum_tokens = [datum.num_tokens for datum in op.datums]
    return Draft(
        kind=kind_of(op),
        payload=raw,
        num_tokens=sum(datum_tokens),
        quantum_tokens=quantum_tokens(datum_tokens, cut_quanta(datum_tokens)),
    )
