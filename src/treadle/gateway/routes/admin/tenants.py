"""Tenants and organisations: who they are, what weight they have, whether they may do anything."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.backlog import Load
from treadle.domain.ids import TENANT_ID, TenantId, checked_name
from treadle.domain.limits import MAX_ID_CHARS
from treadle.domain.tenants import OrganizationRecord, TenantChange, TenantRecord, TenantStanding, user_of
from treadle.domain.usage import HOUR_S, UsageKind
from treadle.errors import InvalidRequest, NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.keyset import cursor_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.store.tenant_listing import TenantQuery
from treadle.wire.admin_bodies import (
    AdminPageQuery,
    OrganizationBody,
    TenantBody,
    TenantsQuery,
    fields_of,
    organization_of,
)
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_admin_tenants import (
    OrganizationAnswer,
    OrganizationsAnswer,
    TenantAnswer,
    TenantDetailAnswer,
    TenantsAnswer,
)
from treadle.wire.bodies import parse_body

router = Resource("/admin/v1")

FORBIDDEN = {403: ErrorAnswer}


@router.get("/tenants", query=TenantsQuery, answer=TenantsAnswer, others=FORBIDDEN)
async def list_tenants(request: Request) -> Response:
    """All tenants by id, a page at a time: who has a key, came through a service, was set by an operator, or has a
    session (open mode)."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, TenantsQuery)
    [after] = [""] if query.after is None else place_of(query.after, str)
    records = await gateway.store.tenant_listing.find(
        TenantQuery(limit=query.limit, after=after, organization=query.organization, text=query.q)
    )
    following = cursor_of([records[-1].tenant_id]) if len(records) == query.limit else None
    return json_response({"tenants": [_tenant(record) for record in records], "next": following})


@router.get("/tenants/{tenant_id}", answer=TenantDetailAnswer, others=FORBIDDEN)
async def get_tenant(request: Request, tenant_id: str) -> Response:
    """One tenant, with its keys, runs, checkpoints, waiting work and today's usage in numbers."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    record = await gateway.store.tenant_listing.get(TenantId(tenant_id))
    if record is None:
        raise NotFound(f"tenant {tenant_id[:120]!r} does not exist")
    standing = await gateway.store.tenant_listing.standing(record.tenant_id)
    return json_response(_tenant(record) | _standing(standing))


@router.put("/tenants/{tenant_id}", body=TenantBody, answer=TenantAnswer, others=FORBIDDEN)
async def put_tenant(request: Request, tenant_id: str) -> Response:
    """Change a tenant's weight class, organisation or suspension; it need not have done anything yet. A suspended
    tenant is refused everything, with the reason, on all servers within a second; its queued work still runs."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(TenantBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    if len(tenant_id) > MAX_ID_CHARS or not TENANT_ID.fullmatch(tenant_id):
        raise InvalidRequest(f"{tenant_id[:120]!r} is not a tenant's id, such as user:alice")
    if not fields_of(body):
        raise InvalidRequest("nothing to change: give weight_class, organization, is_suspended or suspended_reason")
    if body.is_suspended and tenant_id == principal.tenant_id:
        raise InvalidRequest("this key belongs to that tenant: to suspend it would end the key's own access")
    change = TenantChange(
        weight_class=body.weight_class,
        organization=organization_of(body),
        is_suspended=body.is_suspended,
        suspended_reason=body.suspended_reason,
    )
    author = Author(principal.tenant_id, principal.actor)
    record = await gateway.store.tenants.change(TenantId(tenant_id), change, author=author)
    await gateway.policies.refresh()
    return json_response(_tenant(record))


@router.get("/organizations", query=AdminPageQuery, answer=OrganizationsAnswer, others=FORBIDDEN)
async def list_organizations(request: Request) -> Response:
    """All organisations by name: those that operators made, and those that tenants came with."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, AdminPageQuery)
    [after] = [""] if query.after is None else place_of(query.after, str)
    records = await gateway.store.organizations.list(query.limit, after=after)
    following = cursor_of([records[-1].name]) if len(records) == query.limit else None
    return json_response({"organizations": [_organization(record) for record in records], "next": following})


@router.get("/organizations/{name}", answer=OrganizationAnswer, others=FORBIDDEN)
async def get_organization(request: Request, name: str) -> Response:
    """One organisation."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    record = await gateway.store.organizations.get(name)
    if record is None:
        raise _no_organization(name)
    return json_response(_organization(record))


@router.put("/organizations/{name}", body=OrganizationBody, answer=OrganizationAnswer, others=FORBIDDEN)
async def put_organization(request: Request, name: str) -> Response:
    """Make an organisation, or describe it anew. Tenants are put into it with PUT /admin/v1/tenants/TENANT_ID."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(OrganizationBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    checked_name(name, what="organization")
    author = Author(principal.tenant_id, principal.actor)
    await gateway.store.organizations.put(name, body.description, author=author)
    record = await gateway.store.organizations.get(name)
    if record is None:
        # Deleted by somebody else in between.
        raise _no_organization(name)
    return json_response(_organization(record))


@router.delete("/organizations/{name}", answer=EmptyAnswer, others=FORBIDDEN)
async def delete_organization(request: Request, name: str) -> Response:
    """Delete an organisation that no tenant is in, and that no quota or loss rule is about."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    author = Author(principal.tenant_id, principal.actor)
    if not await gateway.store.organizations.delete(name, author=author):
        raise _no_organization(name)
    return json_response({})


def used(amounts: Mapping[UsageKind, float]) -> dict[str, object]:
    """Amounts of usage as answers have them (UsedAnswer)."""

    def tokens(kind: UsageKind) -> int:
        return round(amounts.get(kind, 0.0))

    return {
        "training_tokens": tokens(UsageKind.TRAINING),
        "prefill_tokens": tokens(UsageKind.PREFILL),
        "cached_prefill_tokens": tokens(UsageKind.PREFILL_CACHED),
        "sampled_tokens": tokens(UsageKind.SAMPLED),
        "checkpoints": tokens(UsageKind.CHECKPOINT),
        "storage_byte_hours": amounts.get(UsageKind.STORAGE, 0.0) / HOUR_S,
    }


def load(waiting: Load) -> dict[str, int]:
    """A load as answers have it (LoadAnswer)."""
    return {"num_ops": waiting.num_ops, "num_tokens": waiting.num_tokens, "num_bytes": waiting.num_bytes}


def _no_organization(name: str) -> NotFound:
    return NotFound(f"organization {name[:120]!r} does not exist")


def _tenant(record: TenantRecord) -> dict[str, object]:
    return {
        "tenant_id": record.tenant_id,
        "user": user_of(record.tenant_id),
        "organization": record.organization,
        "weight_class": record.weight_class.value,
        "source": record.source,
        "is_suspended": record.is_suspended,
        "suspended_reason": record.suspended_reason,
        "created_at": None if record.created_at is None else iso_time(record.created_at),
        "updated_at": None if record.updated_at is None else iso_time(record.updated_at),
    }


def _standing(standing: TenantStanding) -> dict[str, object]:
    return {
        "num_keys": standing.num_keys,
        "num_active_sessions": standing.num_active_sessions,
        "num_live_runs": standing.num_live_runs,
        "num_checkpoints": standing.num_checkpoints,
        "checkpoint_bytes": standing.checkpoint_bytes,
        "queued": {
            "training": load(standing.queued.get(False, Load())),
            "sampling": load(standing.queued.get(True, Load())),
        },
        "usage_today": used(standing.usage_today),
    }


def _organization(record: OrganizationRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "description": record.description,
        "num_tenants": record.num_tenants,
        "created_at": None if record.created_at is None else iso_time(record.created_at),
    }
