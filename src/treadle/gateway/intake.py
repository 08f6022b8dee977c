"""The steps that submissions share: body in, owner found, row placed, future out.

Routes combine these with the op builders of wire. It refuses to know what any op means.
Invariant: once a place is known, nothing but a dead store, or a pool that is still loading (503, asked again),
keeps the request from becoming a row.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import ModelId, RequestId, TenantId, op_request_id
from treadle.domain.limits import MAX_SEQ_ID_LEAD
from treadle.domain.ops import OpKind, TrainingOp, kind_of
from treadle.domain.outcome import PoolFacts
from treadle.domain.records import ModelRecord, NewRequest
from treadle.domain.states import ModelState
from treadle.errors import BodyTooLarge, InvalidRequest, NotFound, Overloaded, UnreadableBody, UserError
from treadle.gateway.admission import INLINE_DECODE_BYTES, Draft
from treadle.gateway.answers import json_response
from treadle.gateway.auth import Principal
from treadle.gateway.backlog import HARD_FACTOR
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body, room_of
from treadle.gateway.context import Gateway, gateway_of, loaded_facts
from treadle.gateway.deps import PoolView
from treadle.wire.bodies import OpHead, read_op_head
from treadle.wire.compression import declared_bytes, decompress
from treadle.wire.passes import PassLimits
from treadle.wire.payloads import encode_payload


@dataclass(frozen=True, slots=True)
class Submission:
    """A sequenced op on its way in: who sent it, what, and to which run."""

    gateway: Gateway
    principal: Principal
    raw: bytes
    model: ModelRecord


BuildTrainingOp = Callable[[Submission], Awaitable[TrainingOp]]


async def read_plain_body(gateway: Gateway, request: Request) -> bytes:
    """The body of a large request (passes, samples), decompressed.

    Raises BodyTooLarge, UnreadableBody for damaged compression, InvalidRequest for another encoding, Overloaded.
    """
    raw = await read_body(request, limit_bytes=gateway.settings.max_body_bytes)
    encoding = request.headers.get("content-encoding")
    if encoding is None:
        return raw
    limit = gateway.settings.max_decompressed_bytes
    try:
        if len(raw) <= INLINE_DECODE_BYTES:
            # A few bytes of zstd can become gigabytes, so what is done on the event loop is bounded by its output.
            return decompress(raw, encoding, limit=min(limit, INLINE_DECODE_BYTES))
    except BodyTooLarge:
        if limit <= INLINE_DECODE_BYTES:
            raise
    declared = declared_bytes(raw, encoding)
    await room_of(request.scope).for_plain(limit if declared is None else min(limit, declared))
    return await gateway.admission.run(lambda: decompress(raw, encoding, limit=limit), num_bytes=limit)


async def submit_training_op(request: Request, kind: OpKind, build: BuildTrainingOp) -> Response:
    """Admit a sequenced op with a JSON body: the future, always, once owner, model and seq_id could be read.

    build: makes the op; a UserError that it raises comes through the future.
    """
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    await let_in(gateway, principal)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    place = await admit_training_op(gateway, principal, raw, kind, build)
    return await answer_op(request, place)


async def admit_training_op(
    gateway: Gateway, principal: Principal, raw: bytes, kind: OpKind, build: BuildTrainingOp
) -> NewRequest:
    """`submit_training_op` for a body that was read already: the place that the op has taken."""
    model_id, seq_id = _op_address(read_op_head(raw))
    model = await gateway.access.model_of_op(principal, model_id, seq_id=seq_id)
    place = op_place(model, kind, seq_id)
    try:
        await open_pool(gateway, principal, model, seq_id)
        op = await build(Submission(gateway, principal, raw, model))
    except UserError as refusal:
        await gateway.admission.submit_refused(place, refusal)
    else:
        await gateway.admission.submit_checked(place, Draft(kind=kind_of(op), payload=encode_payload(op)))
    return place


async def let_in(gateway: Gateway, principal: Principal) -> None:
    """Return when the tenant may send another training op. Raises Overloaded, before its body is read.

    Only far beyond the limits, where slowing the client down (`answer_op`) was not enough.
    """
    excess = await gateway.backlog.wait_for_room(
        principal.tenant_id, hold_s=gateway.settings.hold_s, is_over=gateway.deps.is_draining, factor=HARD_FACTOR
    )
    if excess is not None:
        raise Overloaded(f"{excess.words}; send this op again when some of it was done")


async def answer_op(request: Request, place: NewRequest) -> Response:
    """The future of an admitted op; late when too much of its tenant waits, so that the client slows down.

    The SDK sends a run's next op after the answer to this one (docs/decisions/0014). Not held back is an op with a hole
    in front of it: one of several chunks, whose client sends the first when the others are answered.
    """
    gateway = gateway_of(request)
    assert place.model_id is not None
    if gateway.backlog.too_far_ahead(place.tenant_id) is not None:
        room_of(request.scope).give_back()
        if await gateway.store.backlog.first_missing(place.model_id, before=place.seq_id) is None:
            await gateway.backlog.wait_for_room(
                place.tenant_id, hold_s=gateway.settings.hold_s, is_over=gateway.deps.is_draining
            )
    return future_of(place.request_id, model_id=place.model_id)


def op_place(model: ModelRecord, kind: OpKind, seq_id: int) -> NewRequest:
    """The row of op `seq_id` of a run, without content."""
    return NewRequest(
        request_id=op_request_id(model.model_id, seq_id),
        tenant_id=model.tenant_id,
        pool=model.pool,
        kind=kind,
        seq_id=seq_id,
        num_tokens=0,
        model_id=model.model_id,
    )


async def open_pool(gateway: Gateway, principal: Principal, model: ModelRecord, seq_id: int) -> PoolView:
    """The pool of a run that may take op `seq_id`.

    Raises UserError otherwise, for the op's row: a 4xx to one of several chunks would hang the SDK, also when all that
    is wrong is that the session is finished (protocol 0.7).
    """
    await gateway.access.active_session(principal, model.session_id)
    check_lead(model, seq_id)
    return checked_pool(gateway, model)


def check_lead(model: ModelRecord, seq_id: int) -> None:
    """Raises InvalidRequest for an op whose seq_id leaves a hole that would cost too many rows to be given up."""
    if seq_id - model.next_seq_id > MAX_SEQ_ID_LEAD:
        raise InvalidRequest(
            f"seq_id {seq_id} is more than {MAX_SEQ_ID_LEAD} ahead of {model.next_seq_id}, the next one of "
            f"{model.model_id}; send ops in order"
        )


def checked_pool(gateway: Gateway, model: ModelRecord) -> PoolView:
    """The pool of a run. Raises UserError when this server does not have it: no scheduler would ever run the op."""
    pool = gateway.deps.pools.by_name(model.pool)
    if pool is not None:
        return pool
    if model.state is ModelState.FAILED:
        raise InvalidRequest(f"model {model.model_id} was never created: {model.state_message}")
    raise NotFound(f"base model {model.base_model[:200]!r} of {model.model_id} is not served by this server now")


def pass_limits(gateway: Gateway, tenant_id: TenantId, facts: PoolFacts) -> PassLimits:
    """What a tenant's requests to a pool are checked against: the model's limits, and within them the tenant's."""
    limits = PassLimits(vocab_size=facts.vocab_size, max_context_length=facts.max_context_length)
    return gateway.quotas.within_context(tenant_id, limits)


def pool_limits(gateway: Gateway, tenant_id: TenantId, pool: PoolView | None) -> PassLimits | None:
    """`pass_limits` of a pool, None for no pool. Raises PoolLoading until it is loaded."""
    return None if pool is None else pass_limits(gateway, tenant_id, loaded_facts(pool))


def future_of(
    request_id: RequestId, *, model_id: ModelId | None = None, sample_sequence_ids: Sequence[str] | None = None
) -> Response:
    """The answer to a submission: an UntypedAPIFuture."""
    body: dict[str, object] = {"request_id": request_id}
    if model_id is not None:
        body["model_id"] = model_id
    if sample_sequence_ids is not None:
        body["sample_sequence_ids"] = sample_sequence_ids
    return json_response(body)


def _op_address(head: OpHead) -> tuple[ModelId, int]:
    if head.model_id is None or head.seq_id is None:
        missing = "model_id" if head.model_id is None else "seq_id"
        raise UnreadableBody(f"{missing} is missing")
    return head.model_id, head.seq_id
