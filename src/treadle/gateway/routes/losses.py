"""Losses as users see them: what is enabled for them, and what became of those that they submitted."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.custom_loss import CUSTOM
from treadle.domain.loss_policy import OPERATIONS, is_enabled
from treadle.gateway.answers import iso_time, json_response
from treadle.gateway.context import gateway_of
from treadle.gateway.loss_answers import built_in_losses
from treadle.gateway.losses import UsableLoss
from treadle.gateway.routing import Resource
from treadle.wire.answers_losses import LossesAnswer

router = Resource("/api/v1")

# Of the caller's own submissions; all of them are in the operators' listing.
MAX_SUBMITTED = 100


@router.get("/losses", answer=LossesAnswer)
async def list_losses(request: Request) -> Response:
    """What the caller may name as loss_fn: built-in losses with their inputs, settings and bounds, whether traced ones
    run and what they may call, and named ones that were approved; and the caller's own submissions."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    policies, tenant_id = gateway.policies.now, principal.tenant_id
    submitted = await gateway.store.named_losses.listing(limit=MAX_SUBMITTED, tenant_id=tenant_id)
    return json_response(
        {
            "built_in": built_in_losses(policies, tenant_id),
            "traced": {
                "is_enabled": is_enabled(policies, tenant_id, CUSTOM),
                "operations": sorted(OPERATIONS - policies.disabled_operations),
            },
            "named": [_named(loss) for loss in await gateway.losses.usable(tenant_id)],
            "submitted": [
                {
                    "name": submission.name,
                    "status": submission.status.value,
                    "reason": submission.reason,
                    "submitted_at": iso_time(submission.submitted_at),
                }
                for submission in submitted
            ],
        }
    )


def _named(loss: UsableLoss) -> dict[str, object]:
    return {
        "name": loss.name,
        "inputs": [{"name": given.name, "rank": given.rank} for given in loss.inputs],
        "definition_sha256": loss.definition_sha256,
    }
