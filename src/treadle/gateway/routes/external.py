"""Weights for use elsewhere: saved as a PEFT directory, fetched by signed URLs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.ids import CheckpointKind
from treadle.domain.ops import OpKind, SaveExternalOp
from treadle.gateway.answers import json_response
from treadle.gateway.checkpoints import path_of_route, readable_checkpoint
from treadle.gateway.context import gateway_of
from treadle.gateway.downloads import PREFIX, file_urls, served_file
from treadle.gateway.intake import Submission, submit_training_op
from treadle.gateway.routing import Resource
from treadle.wire.answers import ErrorAnswer, FutureAnswer
from treadle.wire.answers_checkpoints import ExternalUrlsAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.checkpoints import SaveExternalBody, save_external_op
from treadle.worker.encryption import check_recipients

# Not all of its paths begin with /api/v1: the files' URLs are nobody's to form but this server's.
router = Resource()


@router.post("/api/v1/save_weights_external", body=SaveExternalBody, answer=FutureAnswer)
async def save_weights_external(request: Request) -> Response:
    """A run's weights as a PEFT directory, a checkpoint of kind external; its files may be encrypted with age."""
    return await submit_training_op(request, OpKind.SAVE_EXTERNAL, _save_external)


@router.get(
    "/api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/external_weights_urls", answer=ExternalUrlsAnswer
)
async def external_weights_urls(request: Request, model_id: str, kind: str, name: str) -> Response:
    """URLs of the files of external weights, own, shared or published ones, that work without a key for an hour."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    path = path_of_route(model_id, kind, name)
    record = await readable_checkpoint(gateway.access, principal, str(path), kinds=(CheckpointKind.EXTERNAL,))
    urls = await file_urls(gateway, request, record, reader=principal.tenant_id)
    return json_response({"urls": urls.by_name, "expires": urls.expires})


@router.get(
    f"{PREFIX}/{{token}}/{{name}}", is_public=True, answer_type="application/octet-stream", others={403: ErrorAnswer}
)
async def download(request: Request, token: str, name: str) -> Response:
    """The file that a signed URL names. Anything that is wrong with the URL is answered 403 in the same words."""
    return await served_file(gateway_of(request), request, token, name)


async def _save_external(submission: Submission) -> SaveExternalOp:
    op = save_external_op(parse_body(SaveExternalBody, submission.raw))
    # The worker would refuse them too, only later.
    check_recipients(op.recipients)
    return op
