"""Checkpoints by name: publish, time to live, deletion, copies, and the archive of older SDKs.

Only its owner changes a checkpoint; to anybody else it does not exist there, published, shared or not.
"""

from __future__ import annotations

from email.utils import formatdate

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import CheckpointKind, TinkerPath
from treadle.errors import NotFound
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.checkpoints import holder_of_token, path_of_route, readable_checkpoint
from treadle.gateway.context import gateway_of
from treadle.gateway.copying import copy_checkpoint
from treadle.gateway.downloads import ARCHIVE_NAME, archive_url
from treadle.gateway.routing import Resource
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_checkpoints import ArchiveAnswer, CopyWeightsAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.checkpoints import CopyWeightsBody, TtlBody

router = Resource("/api/v1")

# A checkpoint's id is two segments, "weights/0001", which the SDK puts into URLs as they are. The longer paths of it
# come first, so that none of them is ever taken for a name.
CHECKPOINT = "/training_runs/{model_id}/checkpoints/{kind}/{name}"
ACCESS_TOKEN_HEADER = "X-Tinker-Weights-Access-Token"


@router.post(f"{CHECKPOINT}/publish", answer=EmptyAnswer)
async def publish(request: Request, model_id: str, kind: str, name: str) -> Response:
    """Let everybody read a checkpoint of the caller by its path; lists show it to its owner alone. Idempotent."""
    return await _set_public(request, path_of_route(model_id, kind, name), public=True)


@router.delete(f"{CHECKPOINT}/publish", answer=EmptyAnswer)
async def unpublish(request: Request, model_id: str, kind: str, name: str) -> Response:
    """End that. Runs and sampling sessions that have the weights keep them. Idempotent."""
    return await _set_public(request, path_of_route(model_id, kind, name), public=False)


@router.put(f"{CHECKPOINT}/ttl", body=TtlBody, answer=EmptyAnswer)
async def set_ttl(request: Request, model_id: str, kind: str, name: str) -> Response:
    """Have a checkpoint of the caller end in so many seconds from now, or with null never."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    path = path_of_route(model_id, kind, name)
    body = parse_body(TtlBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    expires_at = None if body.ttl_seconds is None else gateway.deps.clock.now() + body.ttl_seconds
    if not await gateway.store.checkpoints.set_expiry(path, principal.tenant_id, expires_at=expires_at):
        raise _missing(path)
    return json_response({})


@router.get(f"{CHECKPOINT}/archive", answer=ArchiveAnswer, status=302)
async def archive(request: Request, model_id: str, kind: str, name: str) -> Response:
    """A redirect to the PEFT directory of a checkpoint of any kind as .tar.gz, good for an hour. For SDKs before 0.36.

    They all know the redirect; the older of them know nothing else. (0.22 knows it too, but its transport follows
    redirects on its own and shows it the archive instead.)
    """
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    path = path_of_route(model_id, kind, name)
    record = await readable_checkpoint(gateway.access, principal, str(path), kinds=tuple(CheckpointKind))
    urls = await archive_url(gateway, request, record, reader=principal.tenant_id)
    body = {"url": urls.by_name[ARCHIVE_NAME], "expires": iso_time(urls.expires_at)}
    headers = {"Location": urls.by_name[ARCHIVE_NAME], "Expires": formatdate(urls.expires_at, usegmt=True)}
    return json_response(body, status=302, headers=headers)


@router.delete(CHECKPOINT, answer=EmptyAnswer)
async def delete_checkpoint(request: Request, model_id: str, kind: str, name: str) -> Response:
    """Take a checkpoint of the caller away. Its files go when no copy, run, queued load or sampler needs them."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    path = path_of_route(model_id, kind, name)
    if not await gateway.store.checkpoints.delete_own(path, principal.tenant_id):
        raise _missing(path)
    return json_response({})


@router.post(
    "/copy_weights", body=CopyWeightsBody, answer=CopyWeightsAnswer, others={403: ErrorAnswer, 410: ErrorAnswer}
)
async def copy_weights(request: Request) -> Response:
    """A copy of a readable checkpoint under a run of the caller's that cannot be trained; the files are shared.

    Readable are one's own, published ones, those that shared projects let one read, and those of the owner whose key
    is sent as the access token. A copy asked for again with the same X-Idempotency-Key is the first one. It goes into a
    project of the caller's own, or into a shared one that it takes part in.
    """
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    body = parse_body(CopyWeightsBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    token = request.headers.get(ACCESS_TOKEN_HEADER) or body.weights_access_token
    reader = await holder_of_token(gateway.auth, token, shown_by=principal)
    source = await readable_checkpoint(
        gateway.access, principal, body.source_path, kinds=tuple(CheckpointKind), on_behalf_of=reader
    )
    key = request.headers.get("X-Idempotency-Key")
    path = await copy_checkpoint(gateway, principal, source, body, idempotency_key=key)
    return json_response({"tinker_path": path})


async def _set_public(request: Request, path: TinkerPath, *, public: bool) -> Response:
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    if not await gateway.store.checkpoints.set_public(path, principal.tenant_id, public=public):
        raise _missing(path)
    return json_response({})


def _missing(path: TinkerPath) -> NotFound:
    return NotFound(f"checkpoint {str(path)[:200]!r} does not exist")
