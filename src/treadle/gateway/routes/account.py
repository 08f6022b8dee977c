"""Who the caller is, what was used, and what was done: tokens, keys, billing, audit.

Everything here is about the caller's own tenant, whichever of its keys asks. Costs are null: prices are not treadle's.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import InvalidRequest
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.routing import Resource
from treadle.wire.answers import EmptyAnswer
from treadle.wire.answers_account import ApiKeyAnswer, AuthTokenAnswer

router = Resource("/api/v1")


@router.post("/auth/token", answer=AuthTokenAnswer)
async def auth_token(request: Request) -> Response:
    """A token in exchange for a key; it lives an hour, or as long as the token that asks for it."""
    gateway = gateway_of(request)
    token = await gateway.auth.token_for(request.headers)
    await read_body(request, limit_bytes=MAX_JSON_BYTES)
    return json_response({"jwt": token})


@router.get("/auth/apikey/me", answer=ApiKeyAnswer)
async def get_own_key(request: Request) -> Response:
    """What the server knows of the key that was sent. It has names and no addresses: `email` is the user's name."""
    principal = await gateway_of(request).caller(request)
    is_created = principal.key_id is not None
    return json_response(
        {
            "key_id": principal.key_id or 0,
            "name": f"{principal.user}-{principal.key_id}" if is_created else principal.user,
            "note": "" if is_created else "open mode: every tml- key is a tenant of its own",
            "details": {"org_details": {"name": principal.tenant_id}, "user_details": {"email": principal.user}},
        }
    )


@router.delete("/auth/apikey/me", answer=EmptyAnswer)
async def revoke_own_key(request: Request) -> Response:
    """End the key that was sent, and every token of it. What its user made stays."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    if principal.key_id is None:
        raise InvalidRequest("this key was not created here, so it cannot be ended: the server is in open mode")
    await gateway.store.keys.revoke(principal.key_id)
    gateway.auth.forget(principal)
    return json_response({})
