"""The loss whitelist: rules about built-in and traced losses, and the operations that graphs may call.

Named losses are decided one by one, in named_losses.py. Invariant: every change here holds on this server when it is
answered, and on all others within a second.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.custom_loss import CUSTOM
from treadle.domain.limits import MAX_ID_CHARS
from treadle.domain.loss_policy import OPERATIONS, check_disabled, check_rule, is_enabled
from treadle.domain.policy import LossRule, Scope
from treadle.errors import InvalidRequest, NotFound
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import MAX_JSON_BYTES, read_body
from treadle.gateway.context import gateway_of
from treadle.gateway.loss_answers import NOBODY, built_in_losses, rule_answer
from treadle.gateway.routing import Resource
from treadle.store.audit import Author
from treadle.wire.answers import EmptyAnswer, ErrorAnswer
from treadle.wire.answers_losses import LossOperationsAnswer, LossRuleAnswer, LossRulesAnswer
from treadle.wire.bodies import parse_body
from treadle.wire.loss_bodies import LossOperationsBody, LossRuleBody

router = Resource("/admin/v1")

FORBIDDEN = {403: ErrorAnswer}


@router.get("/losses", answer=LossRulesAnswer, others=FORBIDDEN)
async def show_loss_rules(request: Request) -> Response:
    """The losses that have rules, every rule of every scope, and the operations that are switched off."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    policies = await gateway.policies.refresh()
    return json_response(
        {
            "built_in": built_in_losses(policies, NOBODY),
            "traced_is_enabled": is_enabled(policies, NOBODY, CUSTOM),
            "rules": [
                rule_answer(scope, loss, rule)
                for scope, rules in sorted(policies.losses.items())
                for loss, rule in sorted(rules.items())
            ],
            "disabled_operations": sorted(policies.disabled_operations),
        }
    )


@router.put("/losses/rules/{scope}/{loss}", body=LossRuleBody, answer=LossRuleAnswer, others=FORBIDDEN)
async def put_loss_rule(request: Request, scope: str, loss: str) -> Response:
    """Say what holds for a built-in loss, or for traced ones ("custom"), in a scope (default, organization:NAME or
    tenant:ID), instead of what was said there. What was admitted before still runs."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(LossRuleBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    bounds = {key: (low, high) for key, (low, high) in body.bounds.items()}
    place, rule = _scope(scope), LossRule(body.is_enabled, bounds)
    check_rule(loss, rule)
    await gateway.store.loss_rules.put(place, loss, rule, Author(principal.tenant_id, principal.actor))
    await gateway.policies.refresh()
    return json_response(rule_answer(str(place), loss, rule))


@router.delete("/losses/rules/{scope}/{loss}", answer=EmptyAnswer, others=FORBIDDEN)
async def delete_loss_rule(request: Request, scope: str, loss: str) -> Response:
    """Say nothing about a loss in a scope: the next wider one decides."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    place = _scope(scope)
    if not await gateway.store.loss_rules.remove(place, loss, Author(principal.tenant_id, principal.actor)):
        raise NotFound(f"scope {place} has no rule for loss {loss[:80]!r}")
    await gateway.policies.refresh()
    return json_response({})


@router.get("/losses/operations", answer=LossOperationsAnswer, others=FORBIDDEN)
async def show_loss_operations(request: Request) -> Response:
    """The operations that graphs of traced and named losses may call, and those of them that are switched off."""
    gateway = gateway_of(request)
    await gateway.admin(request)
    policies = await gateway.policies.refresh()
    return json_response({"operations": sorted(OPERATIONS), "disabled": sorted(policies.disabled_operations)})


@router.put("/losses/operations", body=LossOperationsBody, answer=LossOperationsAnswer, others=FORBIDDEN)
async def put_loss_operations(request: Request) -> Response:
    """Switch off exactly these operations: new losses that call one are refused, and so are passes with older ones,
    approved ones included. What was admitted before still runs."""
    gateway = gateway_of(request)
    principal = await gateway.admin(request)
    body = parse_body(LossOperationsBody, await read_body(request, limit_bytes=MAX_JSON_BYTES))
    check_disabled(body.disabled)
    await gateway.store.loss_rules.disable_operations(body.disabled, Author(principal.tenant_id, principal.actor))
    policies = await gateway.policies.refresh()
    return json_response({"operations": sorted(OPERATIONS), "disabled": sorted(policies.disabled_operations)})


def _scope(text: str) -> Scope:
    """Raises InvalidRequest."""
    try:
        scope = Scope.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"scope {error}") from None
    if len(scope.name) > MAX_ID_CHARS:
        raise InvalidRequest(f"scope {text[:80]!r}... is over {MAX_ID_CHARS} characters")
    return scope
