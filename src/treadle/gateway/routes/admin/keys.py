"""API keys of all users: create, list, change, revoke.

Invariant: a key leaves the server once, in the answer to whoever made it.
"""

from __future__ import annotations

from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import checked_name
from treadle.domain.keys import key_digest, new_key
from treadle.domain.records import KeyRecord
from treadle.errors import InvalidRequest, NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.keyset import cursor_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.wire.answers import ErrorAnswer
from treadle.wire.answers_admin_keys import KeyAnswer, KeysAnswer, NewKeyAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.key_bodies import MAX_KEY_LIFE_S, KeyBody, KeysQuery, NewKeyBody

router = Resource("/admin/v1")

FORBIDDEN = {403: ErrorAnswer}
# Ids are numbers of at most this many digits.
_MAX_DIGITS = 18


@router.get("/keys", query=KeysQuery, answer=KeysAnswer, others=FORBIDDEN)
async def list_keys(request: Request) -> Response:
    """All keys, newest first, a page at a time; revoked and expired ones included."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, KeysQuery)
    [before] = [None] if query.before is None else place_of(query.before, int)
    records = await gateway.store.keys.page(limit=query.limit, before=before, user=query.user)
    organizations = await gateway.store.keys.organizations([record.tenant_id for record in records])
    now = gateway.deps.clock.now()
    return json_response(
        {
            "keys": [_key(record, organizations.get(record.tenant_id), now) for record in records],
            "next": cursor_of([records[-1].key_id]) if len(records) == query.limit else None,
        }
    )


@router.post("/keys", body=NewKeyBody, answer=NewKeyAnswer, others=FORBIDDEN)
async def create_key(request: Request) -> Response:
    """Make a key for a user, who need not have one yet. The answer is the only place where it is ever shown."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(NewKeyBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    key = new_key()
    record = await gateway.store.keys.add(
        checked_name(body.user, what="user"),
        key_digest(key),
        body.is_admin,
        name=body.name,
        expires_at=None if body.expires_in_s is None else gateway.deps.clock.now() + body.expires_in_s,
        organization=None if body.organization is None else checked_name(body.organization, what="organization"),
        author=Author(principal.tenant_id, principal.actor),
    )
    await gateway.policies.refresh()
    return json_response({**await _shown(gateway, record), "key": key})


@router.get("/keys/{key_id}", answer=KeyAnswer, others=FORBIDDEN)
async def get_key(request: Request, key_id: str) -> Response:
    """One key, without the key itself."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    record = await gateway.store.keys.get(_number(key_id))
    if record is None:
        raise _unknown(key_id)
    return json_response(await _shown(gateway, record))


@router.put("/keys/{key_id}", body=KeyBody, answer=KeyAnswer, others=FORBIDDEN)
async def put_key(request: Request, key_id: str) -> Response:
    """Rename a key, or give it another end; all servers follow within a second. A revoked one stays as it is."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(KeyBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    if not body.model_fields_set:
        raise InvalidRequest("nothing to change: give name or expires_at")
    before = await gateway.store.keys.get(_number(key_id))
    if before is None:
        raise _unknown(key_id)
    expires_at = _checked_end(body.expires_at, gateway.deps.clock.now())
    record = await gateway.store.keys.change(
        before.key_id,
        name=body.name if "name" in body.model_fields_set else before.name,
        expires_at=expires_at if "expires_at" in body.model_fields_set else before.expires_at,
        author=Author(principal.tenant_id, principal.actor),
    )
    assert record is not None, "no key is ever deleted"
    gateway.auth.forget_key(record.key_id)
    return json_response(await _shown(gateway, record))


@router.delete("/keys/{key_id}", answer=KeyAnswer, others=FORBIDDEN)
async def revoke_key(request: Request, key_id: str) -> Response:
    """End a key and every token of it: here at once, on other servers within a second. What its user made stays, and
    the key stays listed. Idempotent."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    await gateway.store.keys.revoke(_number(key_id), author=Author(principal.tenant_id, principal.actor))
    gateway.auth.forget_key(_number(key_id))
    record = await gateway.store.keys.get(_number(key_id))
    if record is None:
        raise _unknown(key_id)
    return json_response(await _shown(gateway, record))


def _checked_end(expires_at: datetime | None, now: float) -> float | None:
    """In epoch seconds; one that is over ends the key now. Raises InvalidRequest for a time that no key needs."""
    if expires_at is None:
        return None
    seconds = expires_at.timestamp()
    if not 0 <= seconds <= now + MAX_KEY_LIFE_S:
        raise InvalidRequest(f"expires_at={expires_at.isoformat()} is not within the next {MAX_KEY_LIFE_S} seconds")
    return seconds


def _number(key_id: str) -> int:
    """Raises NotFound for what can be no id."""
    if not (key_id.isascii() and key_id.isdecimal() and len(key_id) <= _MAX_DIGITS):
        raise _unknown(key_id)
    return int(key_id)


def _unknown(key_id: str) -> NotFound:
    return NotFound(f"key {key_id[:40]!r} does not exist")


async def _shown(gateway: Gateway, record: KeyRecord) -> dict[str, object]:
    organizations = await gateway.store.keys.organizations([record.tenant_id])
    return _key(record, organizations.get(record.tenant_id), gateway.deps.clock.now())


def _key(record: KeyRecord, organization: str | None, now: float) -> dict[str, object]:
    has_ended = record.expires_at is not None and record.expires_at <= now
    return {
        "key_id": record.key_id,
        "user": record.user,
        "tenant_id": record.tenant_id,
        "organization": organization,
        "name": record.name,
        "is_admin": record.is_admin,
        "created_at": iso_time(record.created_at),
        "created_by": record.created_by,
        "expires_at": None if record.expires_at is None else iso_time(record.expires_at),
        "revoked_at": None if record.revoked_at is None else iso_time(record.revoked_at),
        "is_usable": record.revoked_at is None and not has_ended,
    }
