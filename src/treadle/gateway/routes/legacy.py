"""What only older SDKs call: forward-only passes as an endpoint of their own (before 0.25)."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ops import OpKind
from treadle.gateway.routes.training import JSON_DECODE_COST, submit_pass
from treadle.gateway.routing import Resource
from treadle.wire.answers import FutureAnswer
from treadle.wire.legacy_bodies import ForwardBody
from treadle.wire.legacy_passes import read_json_pass

router = Resource("/api/v1")

_read_json = partial(read_json_pass, input_field="forward_input", forward_only=True)


@router.post("/forward", body=ForwardBody, answer=FutureAnswer)
async def forward(request: Request) -> Response:
    """One pass without gradients, in JSON. Newer SDKs say forward_only in the protobuf of forward_backward."""
    return await submit_pass(request, OpKind.FORWARD, _read_json, decode_cost=JSON_DECODE_COST)
