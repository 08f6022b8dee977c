"""Quotas: what tenants may use, by scope, and what one tenant uses of it."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import TenantId
from treadle.domain.limits import MAX_ID_CHARS
from treadle.domain.policy import Quota, Scope
from treadle.domain.quotas import QUOTAS
from treadle.errors import InvalidRequest
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.routes.quotas import standings_json
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.wire.answers import ErrorAnswer
from treadle.wire.answers_admin_quotas import QuotasAnswer, ScopeQuotasAnswer, TenantQuotasAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.quota_bodies import QuotasBody

router = Resource("/admin/v1")

FORBIDDEN = {403: ErrorAnswer}


@router.get("/quotas", answer=QuotasAnswer, others=FORBIDDEN)
async def list_quotas(request: Request) -> Response:
    """Every quota with its unit, what this server allows, and what each scope sets."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    by_scope = await gateway.store.quotas.all()
    return json_response(
        {
            "quotas": [_facts(gateway, quota) for quota in Quota],
            "scopes": [_scope_json(scope, limits) for scope, limits in by_scope.items()],
        }
    )


@router.get("/quotas/{scope}", answer=ScopeQuotasAnswer, others=FORBIDDEN)
async def get_quotas(request: Request, scope: str) -> Response:
    """What one scope sets: default, organization:NAME or tenant:ID."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    of = _scope(scope)
    return json_response(_scope_json(str(of), await gateway.store.quotas.of(of)))


@router.put("/quotas/{scope}", body=QuotasBody, answer=ScopeQuotasAnswer, others=FORBIDDEN)
async def set_quotas(request: Request, scope: str) -> Response:
    """Set some quotas of one scope, or unset them with null. In effect on every server within a second."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    of = _scope(scope)
    body = parse_body(QuotasBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    changes = gateway.quotas.checked(body.changes)
    after = await gateway.store.quotas.change(of, changes, Author(principal.tenant_id, principal.actor))
    await gateway.policies.refresh()
    return json_response(_scope_json(str(of), after))


@router.delete("/quotas/{scope}", answer=ScopeQuotasAnswer, others=FORBIDDEN)
async def delete_quotas(request: Request, scope: str) -> Response:
    """Have a scope set nothing any more."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    of = _scope(scope)
    await gateway.store.quotas.clear(of, Author(principal.tenant_id, principal.actor))
    await gateway.policies.refresh()
    return json_response(_scope_json(str(of), {}))


@router.get("/tenants/{tenant_id}/quotas", answer=TenantQuotasAnswer, others=FORBIDDEN)
async def get_tenant_quotas(request: Request, tenant_id: str) -> Response:
    """The limits of one tenant, who set each, and what it uses now. Also of one that was never seen."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    return json_response(await standings_json(gateway, TenantId(tenant_id[:MAX_ID_CHARS])))


def _scope(text: str) -> Scope:
    if len(text) > MAX_ID_CHARS:
        raise InvalidRequest(f"the scope has over {MAX_ID_CHARS} characters")
    try:
        return Scope.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"scope {error}") from error


def _scope_json(scope: str, limits: Mapping[Quota, int]) -> dict[str, object]:
    return {"scope": scope, "quotas": {quota.value: value for quota, value in limits.items()}}


def _facts(gateway: Gateway, quota: Quota) -> dict[str, object]:
    facts = QUOTAS[quota]
    return {
        "quota": quota.value,
        "unit": facts.unit,
        "meaning": facts.meaning,
        "default": gateway.quotas.default(quota),
        "lowest": facts.lowest,
        "highest": gateway.quotas.most(quota),
    }
