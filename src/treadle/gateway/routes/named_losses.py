"""Losses that users submit: hand one in, see what became of it, withdraw it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.named_losses import Submission, is_name
from treadle.errors import NotFound
from treadle.gateway.answers import json_response
from treadle.gateway.auth import Principal
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.loss_pages import submission_answer
from treadle.gateway.named_losses import submission_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.wire.answers import EmptyAnswer
from treadle.wire.answers_named_losses import SubmissionAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.named_loss_bodies import SubmitLossBody

router = Resource("/api/v1")


@router.post("/losses", body=SubmitLossBody, answer=SubmissionAnswer)
async def submit_loss(request: Request) -> Response:
    """Submit a loss for review, as a graph or as a Python file, uploaded or from a hub. Nothing of it is executed and
    no hub is asked before an operator begins the review; once it is approved, passes name it as loss_fn."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    body = parse_body(SubmitLossBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    new = submission_of(body, principal.tenant_id, gateway.settings.losses)
    return json_response(submission_answer(await gateway.store.named_losses.submit(new, _author(principal))))


@router.get("/losses/{name}", answer=SubmissionAnswer)
async def get_submission(request: Request, name: str) -> Response:
    """The caller's newest submission of this name: its status, what its review found, why it was refused."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    return json_response(submission_answer(await _own(gateway, principal, name)))


@router.delete("/losses/{name}", answer=EmptyAnswer)
async def withdraw_loss(request: Request, name: str) -> Response:
    """Withdraw the caller's pending submission of this name; nothing is kept of it."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    submission = await _own(gateway, principal, name)
    await gateway.store.named_losses.remove(submission.named_loss_id, _author(principal), only_pending=True)
    return json_response({})


async def _own(gateway: Gateway, principal: Principal, name: str) -> Submission:
    """Raises NotFound, which others' losses look like."""
    submission = None
    if is_name(name):
        submission = await gateway.store.named_losses.newest(name, principal.tenant_id)
    if submission is None:
        raise NotFound(f"you submitted no loss {name[:80]!r}")
    return submission


def _author(principal: Principal) -> Author:
    return Author(principal.tenant_id, principal.actor)
