"""Sessions: one per client process, kept alive by heartbeats, ended by `finish`.

Here nothing ever expires: the sweeps find out who is silent, and an expired session takes heartbeats and work like any
other (docs/lifecycle.md).
"""

from __future__ import annotations

import asyncio
from typing import assert_never

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import DEFAULT_PROJECT, SessionId, TenantId, new_session_id
from treadle.domain.limits import SIGNED_URL_LIFE_S
from treadle.domain.records import SessionRecord
from treadle.domain.states import SessionState
from treadle.errors import Forbidden, InvalidRequest, NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.auth import Principal, urn_of
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.paging import page_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.gateway.signing import BadToken
from treadle.gateway.stability import objective_notice
from treadle.gateway.traces import chrome_trace
from treadle.gateway.user_names import tenant_of_urn
from treadle.store.session_search import FoundSession, Place, SessionQuery
from treadle.wire.account_bodies import (
    AssignProjectBody,
    ScopedPageQuery,
    ScopeQuery,
    SearchedStatus,
    SearchSessionsBody,
)
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_sessions import (
    CreateSessionAnswer,
    HeartbeatAnswer,
    SearchAnswer,
    SessionAnswer,
    SessionsAnswer,
    TraceExportAnswer,
)
from treadle.wire.bodies import CreateSessionBody, FinishBody, HeartbeatBody, parse_body

router = Resource("/api/v1")

# The SDK sends "stainless-python-retry-" and a UUID.
MAX_IDEMPOTENCY_KEY_CHARS = 256
# What the tokens in URLs of traces are for.
_TRACE = "trace"


@router.post("/create_session", body=CreateSessionBody, answer=CreateSessionAnswer, others={403: ErrorAnswer})
async def create_session(request: Request) -> Response:
    """A session; the same one again for the same X-Idempotency-Key of the same tenant.

    A project_id is a name of the caller's own, or the id of a shared project that it takes part in.
    """
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    body = parse_body(CreateSessionBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    key = request.headers.get("x-idempotency-key") or None
    if key is not None and len(key) > MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest(f"X-Idempotency-Key is longer than {MAX_IDEMPOTENCY_KEY_CHARS} characters")
    await gateway.access.check_project(principal, body.project_id)
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
        tags=tuple(body.tags),
    )
    first = await gateway.store.sessions.create(record, idempotency_key=key)
    notice = objective_notice(body.sdk_version)
    return json_response({"session_id": first.session_id, **({} if notice is None else {"warning_message": notice})})


@router.post("/session_heartbeat", body=HeartbeatBody, answer=HeartbeatAnswer, others={410: ErrorAnswer})
async def session_heartbeat(request: Request) -> Response:
    """Noted; 410 once the session is finished, which ends the SDK's heartbeat loop. An expired session wakes up."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(HeartbeatBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    session = await gateway.access.active_session(principal, body.session_id)
    gateway.hub.beat(session.session_id)
    return json_response({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish", body=FinishBody, answer=EmptyAnswer)
async def finish_session(request: Request, session_id: str) -> Response:
    """No new work after this. Idempotent: the first reason stays. What is queued still runs."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    raw = await read_body(request, limit_bytes=MAX_JSON_BYTES)
    body = parse_body(FinishBody, raw or b"{}")
    session = await gateway.access.session(principal, SessionId(session_id))
    await gateway.store.sessions.finish(session.session_id, body.reason.type, body.detail)
    gateway.access.session_changed(session.session_id)
    return json_response({})


@router.get("/sessions", query=ScopedPageQuery, answer=SessionsAnswer)
async def list_sessions(request: Request) -> Response:
    """The caller's session ids, newest first; of `accessible` ones also those that shared projects let it read."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    page = page_of(request, default_limit=20)
    query = query_of(request, ScopeQuery)
    sessions, _total = await gateway.store.sessions.list(
        principal.tenant_id, page.limit, page.offset, with_shared=query.with_shared
    )
    return json_response({"sessions": [session.session_id for session in sessions]})


@router.post("/sessions/search", body=SearchSessionsBody, answer=SearchAnswer)
async def search_sessions(request: Request) -> Response:
    """The sessions that the caller may read and that fit every filter, newest first; and where the next page begins.

    Those of others are found, for the owners `accessible` and `user`, as far as shared projects let the caller read
    them. A project that no session of the caller's is in, and that it takes no part in, does not exist.
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(SearchSessionsBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    if body.project_ids:
        known = await gateway.store.session_search.projects_among(principal.tenant_id, body.project_ids)
        for project_id in body.project_ids:
            if project_id not in known:
                raise NotFound(f"project {project_id[:200]!r} does not exist: no session of yours is in it")
    # One more than the page, to see whether there is a next one.
    found = await gateway.store.session_search.find(_session_query(principal, body, limit=body.limit + 1))
    page = found[: body.limit]
    cursor = None if len(found) == len(page) else _cursor_behind(page[-1].record)
    return json_response({"sessions": [_summary(entry) for entry in page], "next_cursor": cursor})


@router.get("/sessions/{session_id}", query=ScopeQuery, answer=SessionAnswer)
async def get_session(request: Request, session_id: str) -> Response:
    """What a session made: its runs and its sampling sessions."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    query = query_of(request, ScopeQuery)
    session = await gateway.access.session(principal, SessionId(session_id), with_shared=query.with_shared)
    models = await gateway.store.models.of_session(session.session_id)
    samplers = await gateway.store.sampling.of_session(session.session_id)
    return json_response(
        {
            "training_run_ids": [model.model_id for model in models],
            "sampler_ids": [sampler.sampling_session_id for sampler in samplers],
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
            "project_id": session.project_id or DEFAULT_PROJECT,
            "tags": session.tags,
        }
    )


@router.put("/sessions/{session_id}/project", body=AssignProjectBody, answer=EmptyAnswer, others={403: ErrorAnswer})
async def assign_session_project(request: Request, session_id: str) -> Response:
    """Move a session of the caller's, and all that it made, into a project.

    That is a name of the caller's own, which comes to be with its first session, or the id of a shared project that it
    takes part in; from then on its members read the session, and what shared it before ends.
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body = parse_body(AssignProjectBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    session = await gateway.access.session(principal, SessionId(session_id))
    await gateway.access.check_project(principal, body.project_id)
    await gateway.store.sessions.assign_project(session.session_id, body.project_id, by=principal.tenant_id)
    gateway.access.session_changed(session.session_id)
    gateway.access.sharing_changed()
    return json_response({})


@router.get("/sessions/{session_id}/trace_export", answer=TraceExportAnswer)
async def export_trace(request: Request, session_id: str) -> Response:
    """A URL of the session's trace in Chrome's format. The trace is made when it is fetched, so it is ready at once."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    session = await gateway.access.session(principal, SessionId(session_id), with_shared=True)
    expires_at = gateway.deps.clock.now() + SIGNED_URL_LIFE_S
    claims: dict[str, str] = {"session": session.session_id}
    if session.tenant_id != principal.tenant_id:
        # It ends with the sharing.
        claims["reader"] = principal.tenant_id
    token = await gateway.signer.sign(_TRACE, claims, expires_at=expires_at)
    base = gateway.settings.public_url or str(request.base_url)
    return json_response({"status": "ready", "url": f"{base.rstrip('/')}/api/v1/traces/{token}"})


@router.get("/traces/{token}", is_public=True, others={403: ErrorAnswer})
async def get_trace(request: Request, token: str) -> Response:
    """The trace behind a URL of trace_export: JSON that ui.perfetto.dev and chrome://tracing draw."""
    gateway = gateway_of(request)
    try:
        claims = await gateway.signer.verify(_TRACE, token)
    except BadToken:
        raise _bad_url() from None
    session_id = SessionId(claims["session"])
    if "reader" in claims and not await gateway.access.is_shared(TenantId(claims["reader"]), session_id):
        raise _bad_url()
    if suspended := gateway.policies.now.suspended:
        session = await gateway.store.sessions.get(session_id)
        if session is None or claims.get("reader", session.tenant_id) in suspended:
            raise _bad_url()
    trace = await gateway.store.traces.of_session(session_id)
    now = gateway.deps.clock.now()
    # Ten megabytes, at most.
    return await asyncio.to_thread(lambda: json_response(chrome_trace(session_id, trace, now=now)))


def _bad_url() -> Forbidden:
    return Forbidden("this URL is not valid, or not any more")


def _session_query(principal: Principal, body: SearchSessionsBody, *, limit: int) -> SessionQuery:
    owners = body.owner.owner_urns
    return SessionQuery(
        tenant_id=principal.tenant_id,
        limit=limit,
        with_shared=body.owner.type != "own",
        owners=None if owners is None else [tenant for urn in owners if (tenant := tenant_of_urn(urn)) is not None],
        session_id=body.session_id,
        display_name=body.display_name,
        project_ids=body.project_ids,
        user_metadata=body.user_metadata,
        states=None if body.statuses is None else [state for status in body.statuses for state in _states(status)],
        behind=None
        if body.cursor is None
        else Place(body.cursor.last_created_at.timestamp(), body.cursor.last_session_id),
    )


def _states(status: SearchedStatus) -> list[tuple[SessionState, str | None]]:
    """What this server calls it. Its sessions are never cancelled, and do not fail with what they asked for."""
    match status.type:
        case "active":
            return [(SessionState.ACTIVE, None)]
        case "client_finished":
            return [(SessionState.FINISHED, reason) for reason in status.reasons or (None,)]
        case "cancelled" | "failed":
            return []


def _cursor_behind(session: SessionRecord) -> dict[str, object]:
    return {"last_created_at": iso_time(session.created_at), "last_session_id": session.session_id}


def _summary(entry: FoundSession) -> dict[str, object]:
    session = entry.record
    return {
        "session_id": session.session_id,
        "created_at": iso_time(session.created_at),
        "owner": urn_of(session.tenant_id),
        "project_id": session.project_id or DEFAULT_PROJECT,
        "status": _status(session),
        "checkpoints_count": entry.num_checkpoints,
        "checkpoint_storage_bytes": entry.checkpoint_bytes,
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
    }


def _status(session: SessionRecord) -> dict[str, object] | None:
    match session.state:
        case SessionState.ACTIVE:
            return {"type": "active"}
        case SessionState.FINISHED:
            reason = {"type": session.finish_reason}
            return {"type": "client_finished", "reason": reason, "detail": session.finish_detail}
        case SessionState.EXPIRED:
            # The API's words for a session that neither finished nor is known to be running.
            return None
        case _:
            assert_never(session.state)
