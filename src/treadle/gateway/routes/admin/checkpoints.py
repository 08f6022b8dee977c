"""Checkpoints of all tenants: list, delete, take back from the public."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import TenantId, TinkerPath, parse_tinker_path
from treadle.domain.records import CheckpointRecord
from treadle.domain.tenants import user_of
from treadle.errors import NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.keyset import cursor_of, place_of
from treadle.gateway.queries import query_of
from treadle.gateway.routes.admin.tenants import FORBIDDEN
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.wire.admin_bodies import AdminCheckpointsQuery, CheckpointBody
from treadle.wire.answers import EmptyAnswer
from treadle.wire.answers_admin_records import AdminCheckpointsAnswer
from treadle.wire.bodies import parse_body

router = Resource("/admin/v1")


@router.get("/checkpoints", query=AdminCheckpointsQuery, answer=AdminCheckpointsAnswer, others=FORBIDDEN)
async def list_all_checkpoints(request: Request) -> Response:
    """Live checkpoints of all kinds and tenants, newest first, a page at a time."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, AdminCheckpointsQuery)
    records = await gateway.store.admin_checkpoints.list(
        query.limit,
        tenant_id=None if query.tenant is None else TenantId(query.tenant),
        is_public=query.public,
        behind=None if query.after is None else place_of(query.after, float, str),
    )
    following = None
    if len(records) == query.limit:
        following = cursor_of([float(records[-1].created_at), records[-1].tinker_path])
    return json_response({"checkpoints": [_checkpoint(record) for record in records], "next": following})


@router.post("/checkpoints/unpublish", body=CheckpointBody, answer=EmptyAnswer, others=FORBIDDEN)
async def unpublish_any_checkpoint(request: Request) -> Response:
    """Have any tenant's checkpoint be its owner's alone again. Runs and sampling sessions that have the weights keep
    them; so do copies. Idempotent."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    path = _path(await read_body(request, limit_bytes=MAX_JSON_BYTES))
    author = Author(principal.tenant_id, principal.actor)
    if not await gateway.store.admin_checkpoints.unpublish(path, author=author):
        raise _missing(path)
    return json_response({})


@router.post("/checkpoints/delete", body=CheckpointBody, answer=EmptyAnswer, others=FORBIDDEN)
async def delete_any_checkpoint(request: Request) -> Response:
    """Take any tenant's checkpoint away. Its files go when no copy, run, queued load or sampler needs them."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    path = _path(await read_body(request, limit_bytes=MAX_JSON_BYTES))
    author = Author(principal.tenant_id, principal.actor)
    if not await gateway.store.admin_checkpoints.delete(path, author=author):
        raise _missing(path)
    return json_response({})


def _path(body: bytes) -> TinkerPath:
    return parse_tinker_path(parse_body(CheckpointBody, body).path)


def _missing(path: TinkerPath) -> NotFound:
    return NotFound(f"checkpoint {str(path)[:200]!r} does not exist")


def _checkpoint(record: CheckpointRecord) -> dict[str, object]:
    return {
        "tinker_path": record.tinker_path,
        "tenant_id": record.tenant_id,
        "user": user_of(record.tenant_id),
        "model_id": record.model_id,
        "kind": record.kind.value,
        "name": record.name,
        "base_model": record.base_model,
        "lora_rank": record.lora.rank,
        "size_bytes": record.size_bytes,
        "created_at": iso_time(record.created_at),
        "expires_at": None if record.expires_at is None else iso_time(record.expires_at),
        "public": record.public,
        "copied_from": record.copied_from,
    }
