"""Custom losses: a traced graph becomes a loss that the server runs, under an id of its own."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import PoolName, custom_loss_id, custom_loss_request_id
from treadle.domain.loss_policy import check_operations
from treadle.domain.ops import OpKind
from treadle.domain.records import CustomLossRecord, NewRequest
from treadle.errors import UserError
from treadle.gateway.admission import refused
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.intake import future_of
from treadle.gateway.losses import GRAPH_DECODE_COST
from treadle.gateway.routing import Resource
from treadle.wire.answers import ErrorAnswer, FutureAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.graphs import (
    CreateCustomLossBody,
    CustomLossHead,
    custom_loss_of,
    custom_loss_result,
    write_custom_loss,
)

router = Resource("/api/v1")

# No pool runs a registration.
NO_POOL = PoolName("")


@router.post("/create_custom_loss", body=CreateCustomLossBody, answer=FutureAnswer, others={410: ErrorAnswer})
async def create_custom_loss(request: Request) -> Response:
    """Register a traced loss; its id comes through the future, and so does what is wrong with it.

    It is checked here and done at once. A retry under the same (session_id, custom_loss_seq_id) gets the first one.
    """
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    head = parse_body(CustomLossHead, raw)
    session = await gateway.access.active_session(principal, head.session_id)
    place = NewRequest(
        request_id=custom_loss_request_id(session.session_id, head.custom_loss_seq_id),
        tenant_id=session.tenant_id,
        pool=NO_POOL,
        kind=OpKind.CREATE_CUSTOM_LOSS,
        seq_id=head.custom_loss_seq_id,
        num_tokens=0,
    )

    def checked() -> CustomLossRecord:
        loss = custom_loss_of(parse_body(CreateCustomLossBody, raw))
        check_operations(loss, gateway.policies.now.disabled_operations)
        return CustomLossRecord(
            loss_id=custom_loss_id(session.session_id, head.custom_loss_seq_id),
            session_id=session.session_id,
            tenant_id=session.tenant_id,
            custom_loss_seq_id=head.custom_loss_seq_id,
            name=loss.name,
            definition=write_custom_loss(loss),
        )

    try:
        await gateway.losses.check_traced(principal.tenant_id)
        record = await gateway.admission.run(checked, num_bytes=GRAPH_DECODE_COST * len(raw))
    except UserError as refusal:
        failure = refused(place, refusal).failure
        assert failure is not None
        await gateway.store.custom_losses.refuse(place, failure)
    else:
        await gateway.store.custom_losses.register(place, record, custom_loss_result(record.loss_id))
    return future_of(place.request_id)
