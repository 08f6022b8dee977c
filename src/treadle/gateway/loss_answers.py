"""How answers show losses: the catalogue with one tenant's rules applied. It refuses to know who asks."""

from __future__ import annotations

from treadle.domain.ids import TenantId
from treadle.domain.loss_policy import bounds_of, is_enabled
from treadle.domain.losses import LOSSES, LossSpec
from treadle.domain.policy import LossRule, Policies

# In no organisation, and in no rule: for it the default decides.
NOBODY = TenantId("")


def built_in_losses(policies: Policies, tenant_id: TenantId) -> list[dict[str, object]]:
    """Every built-in loss with what it reads, and what this tenant may do with it."""
    return [_built_in(spec, policies, tenant_id) for spec in LOSSES.values()]


def rule_answer(scope: str, loss: str, rule: LossRule) -> dict[str, object]:
    """One rule."""
    bounds = {key: list(pair) for key, pair in rule.bounds.items()}
    return {"scope": scope, "loss": loss, "is_enabled": rule.is_enabled, "bounds": bounds}


def _built_in(spec: LossSpec, policies: Policies, tenant_id: TenantId) -> dict[str, object]:
    bounds = bounds_of(policies, tenant_id, spec.name)
    settings = []
    for key, default in spec.config_defaults.items():
        low, high = bounds.get(key, (None, None))
        settings.append({"name": key, "default": default, "low": low, "high": high})
    return {
        "name": spec.name,
        "is_enabled": is_enabled(policies, tenant_id, spec.name),
        "required_inputs": list(spec.required_inputs),
        "optional_inputs": [*spec.optional_inputs, *spec.compared_inputs],
        "settings": settings,
    }
