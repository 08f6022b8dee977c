"""Training ops of a run: passes, steps, saves. All are sequenced; none waits here for another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ops import OpKind, OptimStepOp, PassOp, SaveForSamplerOp, SaveWeightsOp, kind_of
from treadle.domain.quanta import cut_quanta, quantum_tokens
from treadle.domain.records import NewRequest
from treadle.errors import InvalidRequest, UserError
from treadle.gateway.admission import Draft
from treadle.gateway.answers import JSON
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
from treadle.gateway.losses import GRAPH_DECODE_COST
from treadle.gateway.routing import Resource
from treadle.gateway.stability import with_sampling_records
from treadle.wire.answers import FutureAnswer
from treadle.wire.bodies import OptimStepBody, SaveForSamplerBody, SaveWeightsBody, parse_body
from treadle.wire.legacy_bodies import ForwardBackwardBody
from treadle.wire.legacy_passes import SentPass, read_json_pass
from treadle.wire.ops import optim_step_op, save_for_sampler_op, save_weights_op
from treadle.wire.passes import decode_pass, read_pass_head, with_meaning
from treadle.wire.results import PROTOBUF

router = Resource("/api/v1")

# Reading a JSON pass takes this many times as long as reading a protobuf of as many bytes.
JSON_DECODE_COST = 8
_read_json = partial(read_json_pass, input_field="forward_backward_input", forward_only=False)


@router.post("/forward_backward", body=ForwardBackwardBody, body_type=PROTOBUF, answer=FutureAnswer)
async def forward_backward(request: Request) -> Response:
    """One pass: protobuf, perhaps compressed, forward-only when its body says so; or JSON (SDKs before 0.25)."""
    if request.headers.get("content-type", "").startswith(JSON):
        return await submit_pass(request, OpKind.FORWARD_BACKWARD, _read_json, decode_cost=JSON_DECODE_COST)
    return await submit_pass(request, OpKind.FORWARD_BACKWARD, _read_protobuf)


async def submit_pass(
    request: Request, kind: OpKind, read: Callable[[bytes], SentPass], *, decode_cost: int = 1
) -> Response:
    """Admit a pass: the future, always, once owner, model and seq_id could be read.

    kind: of the row, as long as its body could not be read. decode_cost: what `read` takes for a byte, compared with
    protobuf.
    """
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    await let_in(gateway, principal)
    # In a call of its own, so that an answer that is held does not hold the body in memory.
    return await answer_op(request, await _admit_pass(gateway, principal, request, kind, read, decode_cost))


async def _admit_pass(
    gateway: Gateway,
    principal: Principal,
    request: Request,
    kind: OpKind,
    read: Callable[[bytes], SentPass],
    decode_cost: int,
) -> NewRequest:
    raw = await read_plain_body(gateway, request)
    sent = await gateway.admission.run(lambda: read(raw), num_bytes=len(raw) * decode_cost)
    head, body = sent.head, sent.body
    model = await gateway.access.model_of_op(principal, head.model_id, seq_id=head.seq_id)
    place = op_place(model, kind, head.seq_id)
    try:
        pool = await open_pool(gateway, principal, model, head.seq_id)
        if isinstance(body, UserError):
            raise body
        meaning = await gateway.losses.meaning(principal, model, head)
    except UserError as refusal:
        await gateway.admission.submit_refused(place, refusal)
        return place
    limits = pass_limits(gateway, model.tenant_id, loaded_facts(pool))

    def checked_op() -> PassOp:
        op = decode_pass(body, limits=limits, meaning=meaning)
        gateway.losses.check(principal.tenant_id, op)
        if len(op.datums) > gateway.settings.max_datums_per_request:
            raise InvalidRequest(
                f"data has {len(op.datums)} datums; this server takes {gateway.settings.max_datums_per_request}"
            )
        return op

    try:
        graph_bytes = 0 if meaning is None or meaning.definition is None else len(meaning.definition)
        op = await gateway.admission.run(checked_op, num_bytes=len(body) + GRAPH_DECODE_COST * graph_bytes)
        payload = await with_sampling_records(gateway, model.session_id, op, body)
        if meaning is not None:
            payload = with_meaning(payload, meaning)
    except UserError as refusal:
        await gateway.admission.submit_refused(place, refusal)
    else:
        await gateway.admission.submit_checked(place, _pass_draft(op, payload))
    return place


@router.post("/optim_step", body=OptimStepBody, answer=FutureAnswer)
async def optim_step(request: Request) -> Response:
    """One optimiser step over the passes since the last one."""
    return await submit_training_op(request, OpKind.OPTIM_STEP, _optim_step)


@router.post("/save_weights", body=SaveWeightsBody, answer=FutureAnswer)
async def save_weights(request: Request) -> Response:
    """A training checkpoint. Whether its name is free is decided when it runs, in seq order."""
    return await submit_training_op(request, OpKind.SAVE_WEIGHTS, _save_weights)


@router.post("/save_weights_for_sampler", body=SaveForSamplerBody, answer=FutureAnswer)
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


def _read_protobuf(raw: bytes) -> SentPass:
    return SentPass(read_pass_head(raw), raw)
