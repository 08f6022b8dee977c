"""Results: one future at a time, or all of a sampling session through its poller.

Bytes go out as they were stored, large ones piece by piece as fast as the client takes them. Only a client that does
not ask for protobuf (SDKs up to 0.18.0) gets passes and samples translated to JSON.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import assert_never

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from treadle.domain.ids import RequestId
from treadle.domain.ops import OpKind
from treadle.domain.records import FutureRecord
from treadle.domain.states import QueueState, RequestState
from treadle.errors import InvalidRequest, NotFound, ResultExpired
from treadle.gateway.answers import JSON, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.routing import Resource
from treadle.gateway.waiting import why_queued
from treadle.store import Completion
from treadle.telemetry.context import bind_context
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_results import CompletionsAnswer, QueuedAnswer, ResultAnswer
from treadle.wire.bodies import CancelFutureBody, RetrieveFutureBody, RetrieveFuturesBody, parse_body
from treadle.wire.legacy_results import pass_result_json, sample_result_json
from treadle.wire.results import PROTOBUF, failure_body, queue_state_body

router = Resource("/api/v1")

# A clone numbers its samples from clone * 1e9 on (tinker 0.38), and seq_ids end at 2**63.
MAX_CLONED_SAMPLER_ID = 2**63 // 10**9 - 2
# Translating a result to JSON takes this many times as long as reading a pass of as many bytes.
JSON_ENCODE_COST = 16
# From this size on a client that allows it is told the size first, so that it fetches no more results at once than it
# has memory for: the SDK keeps those it knows the size of within 50 MiB. To such a size one more round trip is nothing.
SIZE_FIRST_BYTES = 2**20
# Larger answers go out in pieces of this size: what is handed over at once is copied on the event loop.
PIECE_BYTES = 256 * 2**10
# Completions in one answer; the poller asks for the next ones at once.
MAX_COMPLETIONS = 512


@router.post(
    "/retrieve_future",
    body=RetrieveFutureBody,
    answer=ResultAnswer,
    answer_type=PROTOBUF,
    others={408: QueuedAnswer, 410: ErrorAnswer},
)
async def retrieve_future(request: Request) -> Response:
    """The result; held for a while when there is none yet, then 408. May be asked for again and again.

    Of a large one that `allow_metadata_only` permits, the size alone: {"status": "complete_metadata",
    "response_payload_size": bytes}.
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(RetrieveFutureBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    request_id = RequestId(body.request_id)
    future = await gateway.hub.future(request_id, principal.tenant_id, hold_s=gateway.settings.hold_s)
    bind_context(request_id=request_id)
    match future.state:
        case RequestState.QUEUED:
            return await _still_queued(gateway, request_id)
        case RequestState.DONE:
            # It may have been held for long: whose access ended meanwhile is told nothing.
            await gateway.caller(request)
            return await _result(
                gateway, future, wants_protobuf=_wants_protobuf(request), wants_size=body.allow_metadata_only
            )
        case RequestState.FAILED:
            return _failure(future)
        case _:
            assert_never(future.state)


@router.post("/retrieve_futures", body=RetrieveFuturesBody, answer=CompletionsAnswer)
async def retrieve_futures(request: Request) -> Response:
    """Samples of one client that finished behind its cursor; held until there is one. Acknowledged results go."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(RetrieveFuturesBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    target = body.target
    if target.cloned_sampler_id > MAX_CLONED_SAMPLER_ID:
        raise InvalidRequest(f"cloned_sampler_id {target.cloned_sampler_id} is over {MAX_CLONED_SAMPLER_ID}")
    sampler = await gateway.access.sampling_session(principal, target.sampling_session_id)
    own_prefix = f"{sampler.sampling_session_id}:"
    acknowledged = [RequestId(id_) for id_ in body.retrieved_request_ids if id_.startswith(own_prefix)]
    if acknowledged:
        await gateway.store.requests.acknowledge(acknowledged)
    hold_s = gateway.settings.hold_s if body.timeout is None else min(body.timeout, gateway.settings.hold_s)
    completions = await gateway.hub.completions(
        sampler.sampling_session_id,
        after=body.prev_cursor,
        cloned_sampler_id=target.cloned_sampler_id,
        limit=MAX_COMPLETIONS,
        hold_s=hold_s,
    )
    cursor = completions[-1].position if completions else body.prev_cursor
    return json_response({"completions": [_completion(done) for done in completions], "cursor": cursor})


@router.post("/cancel_future", body=CancelFutureBody, answer=EmptyAnswer)
async def cancel_future(request: Request) -> Response:
    """Nobody waits for this sample any more: it ends where it is. One that is over stays as it is."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(CancelFutureBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    row = await gateway.store.requests.get(RequestId(body.request_id))
    if row is None or row.tenant_id != principal.tenant_id:
        raise NotFound(f"request {body.request_id[:120]!r} does not exist")
    if row.kind is not OpKind.SAMPLE:
        raise InvalidRequest(f"{row.request_id} is a {row.kind.value}; only samples can be cancelled")
    await gateway.cancel_sample(row.request_id)
    return json_response({})


async def _still_queued(gateway: Gateway, request_id: RequestId) -> Response:
    """408 with the state on top level, where the SDK looks for it (protocol trap 5)."""
    state, reason = QueueState.ACTIVE, ""
    row = await gateway.store.requests.get(request_id)
    # It may have ended since; the client asks again at once.
    if row is not None and row.state is RequestState.QUEUED:
        wait = await why_queued(gateway, row)
        state, reason = wait.state, wait.reason
    return Response(queue_state_body(state, reason=reason), status_code=408, media_type=JSON)


def _wants_protobuf(request: Request) -> bool:
    # SDKs may send two headers, the usual "application/json" first.
    return any(PROTOBUF in accepted for accepted in request.headers.getlist("accept"))


async def _result(gateway: Gateway, future: FutureRecord, *, wants_protobuf: bool, wants_size: bool) -> Response:
    if future.result is None:
        raise ResultExpired(f"the result of {future.request_id} is no longer kept")
    body, content_type = future.result.body, future.result.content_type
    if wants_size and len(body) >= SIZE_FIRST_BYTES:
        return json_response({"status": "complete_metadata", "response_payload_size": len(body)})
    if content_type == PROTOBUF and not wants_protobuf:
        as_json = sample_result_json if future.kind is OpKind.SAMPLE else pass_result_json
        stored = body
        body = await gateway.admission.run(lambda: as_json(stored), num_bytes=len(stored) * JSON_ENCODE_COST)
        content_type = JSON
    gateway.hub.delivered(future.request_id)
    # Not media_type: that would add a charset to what was stored.
    headers = {"content-type": content_type, "content-length": str(len(body))}
    if len(body) <= PIECE_BYTES:
        return Response(body, headers=headers)
    return StreamingResponse(_pieces(body), headers=headers)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """`body`, cut. Between two pieces the server waits until the client has taken most of what it was sent."""
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


def _failure(future: FutureRecord) -> Response:
    assert future.failure is not None, f"{future.request_id} failed without a reason"
    if future.is_transient and future.kind is OpKind.SAMPLE:
        # The SDK submits a sample again after 410, while an error body would be final (protocol trap 32).
        raise ResultExpired(future.failure.message)
    return Response(failure_body(future.failure), media_type=JSON)


def _completion(done: Completion) -> dict[str, object]:
    if done.state is not RequestState.DONE:
        return {"state": "failed", "request_id": done.request_id}
    body: dict[str, object] = {"state": "finished", "request_id": done.request_id}
    if done.result_bytes is not None:
        body["response_payload_uncompressed_size"] = done.result_bytes
    return body
