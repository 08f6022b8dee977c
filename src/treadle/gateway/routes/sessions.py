"""Sessions: one per client process, kept alive by heartbeats, ended by `finish`.

Here nothing ever expires: the sweeps find out who is silent, and an expired session takes heartbeats and work like any
other (docs/lifecycle.md).
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import SessionId, new_session_id
from treadle.domain.records import SessionRecord
from treadle.domain.states import SessionState
from treadle.errors import InvalidRequest
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.paging import page_of
from treadle.gateway.routing import Resource
from treadle.gateway.stability import objective_notice
from treadle.wire.bodies import CreateSessionBody, FinishBody, HeartbeatBody, parse_body

router = Resource("/api/v1")

# The SDK sends "stainless-python-retry-" and a UUID.
MAX_IDEMPOTENCY_KEY_CHARS = 256


@router.post("/create_session")
async def create_session(request: Request) -> Response:
    """A session; the same one again for the same X-Idempotency-Key of the same tenant."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    body = parse_body(CreateSessionBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    key = request.headers.get("x-idempotency-key") or None
    if key is not None and len(key) > MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest(f"X-Idempotency-Key is longer than {MAX_IDEMPOTENCY_KEY_CHARS} characters")
    now = gateway.deps.clock.now()
    record = SessionRecord(
        session_id=new_session_id(),
        tenant_id=principal.tenant_id,
        state=SessionState.ACTIVE,
        created_at=now,
        last_heartbeat_at=now,
        sdk_version=body.sdk_version,
        project_id=body.project_id,
        display_name=body.display_name,
        user_metadata=body.user_metadata,
    )
    first = await gateway.store.sessions.create(record, idempotency_key=key)
    notice = objective_notice(body.sdk_version)
    return json_response({"session_id": first.session_id, **({} if notice is None else {"warning_message": notice})})


@router.post("/session_heartbeat")
async def session_heartbeat(request: Request) -> Response:
    """Noted; 410 once the session is finished, which ends the SDK's heartbeat loop. An expired session wakes up."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(HeartbeatBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    session = await gateway.access.active_session(principal, body.session_id)
    gateway.hub.beat(session.session_id)
    return json_response({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish")
async def finish_session(request: Request, session_id: str) -> Response:
    """No new work after this. Idempotent: the first reason stays. What is queued still runs."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    body = parse_body(FinishBody, raw or b"{}")
    session = await gateway.access.session(principal, SessionId(session_id))
    await gateway.store.sessions.finish(session.session_id, body.reason.type, body.detail)
    gateway.access.session_finished(session.session_id)
    return json_response({})


@router.get("/sessions")
async def list_sessions(request: Request) -> Response:
    """The caller's session ids, newest first."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    page = page_of(request, default_limit=20)
    sessions, _total = await gateway.store.sessions.list(principal.tenant_id, page.limit, page.offset)
    return json_response({"sessions": [session.session_id for session in sessions]})


@router.get("/sessions/{session_id}")
async def get_session(request: Request, session_id: str) -> Response:
    """What a session made: its runs and its sampling sessions."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    session = await gateway.access.session(principal, SessionId(session_id))
    models = await gateway.store.models.of_session(session.session_id)
    samplers = await gateway.store.sampling.of_session(session.session_id)
    return json_response(
        {
            "training_run_ids": [model.model_id for model in models],
            "sampler_ids": [sampler.sampling_session_id for sampler in samplers],
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
        }
    )
