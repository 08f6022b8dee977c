"""Submitted losses for operators: read them, review them, decide.

Invariant: every decision holds on this server when it is answered, and on all others within a second.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.named_losses import LossStatus, Submission
from treadle.errors import NotFound
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.loss_pages import detail_answer, summary_answer
from treadle.gateway.named_losses import submission_of
from treadle.gateway.queries import query_of
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_named_losses import NamedLossDetailAnswer, NamedLossesAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.named_loss_bodies import ApproveLossBody, LossReasonBody, NamedLossesQuery, SubmitLossBody

router = Resource("/admin/v1")

FORBIDDEN = {403: ErrorAnswer}
# 503: another review runs here, or a hub does not answer.
UNAVAILABLE = {**FORBIDDEN, 503: ErrorAnswer}
_MAX_ID_DIGITS = 18


@router.get("/losses/named", query=NamedLossesQuery, answer=NamedLossesAnswer, others=FORBIDDEN)
async def list_named_losses(request: Request) -> Response:
    """Submitted losses of all tenants, newest first, a page at a time."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    query = query_of(request, NamedLossesQuery)
    found = await gateway.store.named_losses.listing(
        limit=query.limit, before=query.before, status=query.wanted_status()
    )
    following = str(found[-1].named_loss_id) if len(found) == query.limit else None
    return json_response({"data": [summary_answer(submission) for submission in found], "next": following})


@router.post("/losses/named", body=SubmitLossBody, answer=NamedLossDetailAnswer, others=FORBIDDEN)
async def submit_named_loss(request: Request) -> Response:
    """Submit a loss of one's own. It is reviewed and approved like any other."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(SubmitLossBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    new = submission_of(body, principal.tenant_id, gateway.settings.losses)
    author = Author(principal.tenant_id, principal.actor)
    return _detail(await gateway.store.named_losses.submit(new, author))


@router.get("/losses/named/{named_loss_id}", answer=NamedLossDetailAnswer, others=FORBIDDEN)
async def get_named_loss(request: Request, named_loss_id: str) -> Response:
    """One submission: its file, the graph that runs, what the review found, what was decided."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    return _detail(await gateway.store.named_losses.get(_number(named_loss_id)))


@router.delete("/losses/named/{named_loss_id}", answer=EmptyAnswer, others=FORBIDDEN)
async def delete_named_loss(request: Request, named_loss_id: str) -> Response:
    """Forget a submission that is pending or was rejected. One that was ever approved stays: queued work may name
    it."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    author = Author(principal.tenant_id, principal.actor)
    await gateway.store.named_losses.remove(_number(named_loss_id), author, only_pending=False)
    await gateway.policies.refresh()
    return json_response({})


@router.post("/losses/named/{named_loss_id}/review", answer=NamedLossDetailAnswer, others=UNAVAILABLE)
async def review_named_loss(request: Request, named_loss_id: str) -> Response:
    """Review a submission, once: fetch its file from the hub, execute it in a process of its own to trace its graph,
    and run the graph on made-up tensors. The answer waits for the end, up to half a minute; a review that takes longer
    is `running` in it and goes on."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    number = _number(named_loss_id)
    review = await gateway.loss_reviews.begin(number, Author(principal.tenant_id, principal.actor))
    await asyncio.wait({review}, timeout=gateway.settings.hold_s)
    return _detail(await gateway.store.named_losses.get(number))


@router.post(
    "/losses/named/{named_loss_id}/approve", body=ApproveLossBody, answer=NamedLossDetailAnswer, others=FORBIDDEN
)
async def approve_named_loss(request: Request, named_loss_id: str) -> Response:
    """Let tenants, or all, use a loss whose review passed. An older one of its owner's with this name is revoked.
    An approved loss gets another list of tenants so."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(ApproveLossBody, await read_body(request, limit_bytes=MAX_JSON_BYTES) or b"{}")
    approved = await gateway.store.named_losses.approve(
        _number(named_loss_id), body.tenants, Author(principal.tenant_id, principal.actor)
    )
    await gateway.policies.refresh()
    return _detail(approved)


@router.post(
    "/losses/named/{named_loss_id}/reject", body=LossReasonBody, answer=NamedLossDetailAnswer, others=FORBIDDEN
)
async def reject_named_loss(request: Request, named_loss_id: str) -> Response:
    """Reject a pending submission; its owner reads why."""
    return await _decided(request, named_loss_id, LossStatus.REJECTED)


@router.post(
    "/losses/named/{named_loss_id}/revoke", body=LossReasonBody, answer=NamedLossDetailAnswer, others=FORBIDDEN
)
async def revoke_named_loss(request: Request, named_loss_id: str) -> Response:
    """Revoke an approved loss, for good: from the next cycle on nothing runs it, queued passes included."""
    return await _decided(request, named_loss_id, LossStatus.REVOKED)


async def _decided(request: Request, named_loss_id: str, status: LossStatus) -> Response:
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(LossReasonBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    author = Author(principal.tenant_id, principal.actor)
    decided = await gateway.store.named_losses.decide(_number(named_loss_id), status, body.reason, author)
    await gateway.policies.refresh()
    return _detail(decided)


def _detail(submission: Submission) -> Response:
    return json_response(detail_answer(submission))


def _number(text: str) -> int:
    """Raises NotFound for what is no number of a submission, as for one that nobody made."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_ID_DIGITS):
        raise NotFound(f"named loss {text[:40]} does not exist")
    return int(text)
