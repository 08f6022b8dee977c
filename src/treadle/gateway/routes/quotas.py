"""A tenant's own quotas: what it may use, and what it does."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import TenantId
from treadle.domain.quotas import QUOTAS
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.quotas import Standing
from treadle.gateway.routing import Resource
from treadle.wire.answers_admin_quotas import TenantQuotasAnswer

router = Resource("/api/v1")


@router.get("/quotas", answer=TenantQuotasAnswer)
async def get_own_quotas(request: Request) -> Response:
    """The limits of the caller, who set each, and what it uses now."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    return json_response(await standings_json(gateway, principal.tenant_id))


async def standings_json(gateway: Gateway, tenant_id: TenantId) -> dict[str, object]:
    """All quotas of a tenant, as both they and operators see them."""
    standings = await gateway.quotas.standings(tenant_id)
    return {"tenant_id": tenant_id, "quotas": [_standing(one) for one in standings]}


def _standing(one: Standing) -> dict[str, object]:
    return {
        "quota": one.quota.value,
        "unit": QUOTAS[one.quota].unit,
        "limit": None if one.limit is None else one.limit.value,
        "scope": None if one.limit is None else one.limit.scope,
        "use": one.used,
        "room_at": None if one.room_at is None else iso_time(one.room_at),
    }
