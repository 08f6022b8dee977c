"""Who the caller is, what was used, and what was done: tokens, keys, billing, audit.

It is about the caller's own tenant, whichever of its keys asks; with an admin key, usage and audit are about all
tenants, as the SDK's AdminClient expects. Costs are null: prices are not treadle's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time
from typing import assert_never

from starlette.requests import Request
from starlette.responses import Response

from treadle.config import AuthMethod
from treadle.domain.ids import DEFAULT_PROJECT, SessionId
from treadle.domain.limits import MAX_ADMIN_USAGE_ROWS, MAX_AUDIT_ROWS, MAX_UNPAGED_ROWS, MAX_USAGE_WINDOW_S
from treadle.domain.records import SessionRecord
from treadle.domain.tenants import user_of
from treadle.domain.usage import HOUR_S, StorageRecord, UsageKind, UsageRecord, hour_of
from treadle.errors import InvalidRequest
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.auth import urn_of
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.store.audit import AuditEvent, Author
from treadle.wire.account_bodies import AuditQuery, StorageQuery, UsageQuery
from treadle.wire.answers import EmptyAnswer
from treadle.wire.answers_account import ApiKeyAnswer, AuditAnswer, AuthTokenAnswer, StorageAnswer, UsageAnswer

router = Resource("/api/v1")

# The unit of storage in the API's answers.
GIGABYTE = 10**9
DAY_S = 24 * HOUR_S
# What there is to say about keys that are recognised in each way.
_NOTES: dict[AuthMethod, str] = {
    "keys": "",
    "open": "open mode: every tml- key is a tenant of its own",
    "modelscope": "a token of ModelScope, where it is made and ended",
}


@router.post("/auth/token", answer=AuthTokenAnswer)
async def auth_token(request: Request) -> Response:
    """A token in exchange for a key; it lives an hour, or as long as the token that asks for it."""
    gateway = gateway_of(request)
    token = await gateway.logged_in(request, gateway.auth.token_for)
    await read_body(request, limit_bytes=MAX_JSON_BYTES)
    return json_response({"jwt": token})


@router.get("/auth/apikey/me", answer=ApiKeyAnswer)
async def get_own_key(request: Request) -> Response:
    """What the server knows of the key that was sent. It has names and no addresses: `email` is the user's name."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    record = None if principal.key_id is None else await gateway.store.keys.get(principal.key_id)
    name = principal.user if record is None else record.name or f"{principal.user}-{record.key_id}"
    organization = principal.organization or principal.tenant_id
    return json_response(
        {
            "key_id": principal.key_id or 0,
            "name": name,
            "note": _NOTES[principal.method],
            "details": {"org_details": {"name": organization}, "user_details": {"email": principal.user}},
        }
    )


@router.delete("/auth/apikey/me", answer=EmptyAnswer)
async def revoke_own_key(request: Request) -> Response:
    """End the key that was sent, and every token of it. What its user made stays."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    if principal.key_id is None:
        raise InvalidRequest(f"this key was not created here, so it cannot be ended: {_NOTES[principal.method]}")
    await gateway.store.keys.revoke(principal.key_id, author=Author(principal.tenant_id, principal.actor))
    gateway.auth.forget(principal)
    return json_response({})


@router.get("/audit", query=AuditQuery, answer=AuditAnswer)
async def read_audit_log(request: Request) -> Response:
    """What was done to the caller's checkpoints and projects on one day of UTC, by time. Teams do not exist here.

    With an admin key: what was done by all tenants and operators, with who did it among the details.
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    query = query_of(request, AuditQuery)
    since = _midnight(query.day or datetime.fromtimestamp(gateway.deps.clock.now(), tz=UTC).date())
    wanted = None if query.event_type == "all" else query.event_type
    events: Sequence[AuditEvent] | None
    if principal.is_admin:
        events = await gateway.store.admin_audit.of_day(since=since, before=since + DAY_S, event_type=wanted)
    else:
        events = await gateway.store.audit.read(
            principal.tenant_id, since=since, before=since + DAY_S, event_type=wanted
        )
    if events is None:
        raise InvalidRequest(f"that day has over {MAX_AUDIT_ROWS} events; ask for one event_type")
    return json_response({"entries": [_entry(event, with_user=principal.is_admin) for event in events]})


@router.get("/billing/usage/events", query=UsageQuery, answer=UsageAnswer)
async def list_usage(request: Request) -> Response:
    """What the caller's sessions used in a window of whole hours: tokens, named saves, and storage of hours that are
    over. A key of any user may ask, about that user; an admin key asks about all tenants."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    query = query_of(request, UsageQuery)
    since, before = _window(query, gateway.deps.clock.now())
    if principal.is_admin:
        records, limit = await gateway.store.admin_usage.events(since=since, before=before), MAX_ADMIN_USAGE_ROWS
    else:
        records = await gateway.store.usage.events(principal.tenant_id, since=since, before=before)
        limit = MAX_UNPAGED_ROWS
    if records is None:
        raise InvalidRequest(f"that window has over {limit} rows of usage; ask for a shorter one")
    sessions = await gateway.store.sessions.of_ids({record.session_id for record in records})
    return json_response(
        {
            "data": [_usage(record, sessions) for record in records],
            "sessions": {name: {"user_metadata": session.user_metadata} for name, session in sessions.items()},
            "cost_data_through": None,
        }
    )


@router.get("/billing/usage/checkpoints/current", query=StorageQuery, answer=StorageAnswer)
async def show_storage(request: Request) -> Response:
    """What the caller's checkpoints take now, by project. A copy counts like what it was copied from. With an admin
    key: of all tenants, by tenant and project."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    query = query_of(request, StorageQuery)
    records: Sequence[StorageRecord] | None
    if principal.is_admin:
        records = await gateway.store.admin_usage.storage(query.project_id)
        if records is None:
            raise InvalidRequest(f"there are over {MAX_ADMIN_USAGE_ROWS} projects with checkpoints; ask for one")
    else:
        records = await gateway.store.usage.storage(principal.tenant_id, query.project_id)
    data = [_storage(record) for record in records]
    return json_response({"effective_rate_usd_per_gigabyte_month": None, "data": data})


def _midnight(day: date) -> float:
    return datetime.combine(day, time(), tzinfo=UTC).timestamp()


def _entry(event: AuditEvent, *, with_user: bool) -> dict[str, object]:
    details = dict(event.details)
    if with_user:
        details |= {"user_id": urn_of(event.tenant_id), "user_name": user_of(event.tenant_id)}
    if with_user and event.subject is not None:
        details |= {"actor": event.actor, "subject": event.subject}
    return {
        "timestamp": iso_time(event.created_at),
        "event": event.event,
        "event_details": details,
        "model_id": event.model_id,
        "tinker_path": event.tinker_path,
        "purpose": event.purpose,
    }


def _window(query: UsageQuery, now: float) -> tuple[int, int]:
    """Epoch seconds. Raises InvalidRequest."""
    since, before = query.starting_on.timestamp(), query.ending_before.timestamp()
    for name, seconds in (("starting_on", since), ("ending_before", before)):
        if seconds != hour_of(seconds):
            raise InvalidRequest(f"{name} is not at the beginning of an hour of UTC")
    if since > now:
        raise InvalidRequest("starting_on is in the future")
    if not since < before <= since + MAX_USAGE_WINDOW_S:
        days = MAX_USAGE_WINDOW_S // DAY_S
        raise InvalidRequest(f"ending_before is not within {days} days behind starting_on")
    return int(since), int(before)


def _usage(record: UsageRecord, sessions: Mapping[SessionId, SessionRecord]) -> dict[str, object]:
    session = sessions.get(record.session_id)
    return {
        "bucket_start": iso_time(record.bucket_start),
        "bucket_end": iso_time(record.bucket_start + HOUR_S),
        "base_model": record.base_model,
        "user_id": urn_of(record.tenant_id),
        "user_name": user_of(record.tenant_id),
        "session_id": record.session_id,
        "project_id": None if session is None else session.project_id or DEFAULT_PROJECT,
        "estimated_cost_usd": None,
        "effective_rate_usd_per_million_tokens": None,
        "effective_rate_usd_per_gigabyte_month": None,
        "event_info": _event_info(record),
    }


def _event_info(record: UsageRecord) -> dict[str, object]:
    amount = round(record.amount)
    match record.kind:
        case UsageKind.TRAINING | UsageKind.SAMPLED:
            return {"type": record.kind.value, "token_count": amount}
        case UsageKind.PREFILL | UsageKind.PREFILL_CACHED:
            is_cached = record.kind is UsageKind.PREFILL_CACHED
            return {"type": "sampling_prefill", "cached": is_cached, "token_count": amount}
        case UsageKind.CHECKPOINT:
            return {"type": "checkpoint", "count": amount}
        case UsageKind.STORAGE:
            return {"type": "storage", "free": False, "gigabyte_hours": record.amount / GIGABYTE / HOUR_S}
        case _:
            assert_never(record.kind)


def _storage(record: StorageRecord) -> dict[str, object]:
    return {
        "project_id": record.project_id,
        "org_user_urn": urn_of(record.tenant_id),
        "user_email": None,
        "user_name": user_of(record.tenant_id),
        "checkpoint_count": record.num_checkpoints,
        "size_bytes": record.num_bytes,
        "size_gigabytes": record.num_bytes / GIGABYTE,
        "estimated_monthly_cost_usd": None,
    }
