"""Which losses a tenant may run, and within which bounds: what operators decided, applied to one tenant or one pass.

Of a loss the narrowest scope that says whether it is enabled decides; of a setting the narrowest scope that bounds it.
Where no scope says anything, a loss is enabled and a setting free. Named losses have no rules: their approval says who
may use them. It refuses to know where decisions are kept. Pure.
Invariant: what is checked is what will be computed, so a default and a bound per token are judged like a setting.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.domain.custom_loss import CUSTOM, CustomLoss, Node, NodeOp
from treadle.domain.custom_loss_names import FUNCTIONS, METHODS, canonical_function
from treadle.domain.ids import TenantId
from treadle.domain.losses import LOSSES, PER_TOKEN_CLIPS, Loss
from treadle.domain.ops import PassOp
from treadle.domain.policy import LossRule, Policies
from treadle.errors import InvalidRequest

Bounds = tuple[float, float]

# What rules are about.
RULED_LOSSES = (*LOSSES, CUSTOM)
_METHOD = "Tensor."
# Every operation that a graph may call, in the form in which it calls it. Whoever switches one off names its forms.
OPERATIONS = FUNCTIONS | {_METHOD + name for name in METHODS}
# Metadata of a run: treadle.loss.NAME says what loss_fn NAME is in that run, for SDKs that send no other names.
ALIAS_PREFIX = "treadle.loss."
# Names that a refusal lists; more of them are counted.
_MAX_NAMES_SHOWN = 40


def is_enabled(policies: Policies, tenant_id: TenantId, loss: str) -> bool:
    """Whether a tenant may run a built-in loss, or traced ones ("custom")."""
    for scope in policies.scopes_of(tenant_id):
        rule = policies.losses.get(scope, {}).get(loss)
        if rule is not None and rule.is_enabled is not None:
            return rule.is_enabled
    return True


def enabled_losses(policies: Policies, tenant_id: TenantId) -> list[str]:
    """The built-in losses that a tenant may run, and "custom" when it may run traced ones."""
    return [loss for loss in RULED_LOSSES if is_enabled(policies, tenant_id, loss)]


def bounds_of(policies: Policies, tenant_id: TenantId, loss: str) -> Mapping[str, Bounds]:
    """The lowest and the highest value of the settings of a loss that are bounded for a tenant."""
    bounds: dict[str, Bounds] = {}
    for scope in policies.scopes_of(tenant_id):
        rule = policies.losses.get(scope, {}).get(loss)
        if rule is not None:
            bounds = {**rule.bounds, **bounds}
    return bounds


def not_enabled(name: str, enabled: Sequence[str], *, note: str = "") -> InvalidRequest:
    """The refusal of a loss, with what may be used instead and how to ask for it. note: what else is known of it."""
    shown = ", ".join(enabled[:_MAX_NAMES_SHOWN]) or "none"
    if len(enabled) > _MAX_NAMES_SHOWN:
        shown += f" and {len(enabled) - _MAX_NAMES_SHOWN} more (GET /api/v1/losses)"
    how = "ask this server's operators for it" if name in RULED_LOSSES else "submit it with POST /api/v1/losses"
    said = f" ({note})" if note else ""
    return InvalidRequest(f"loss_fn {name[:80]!r} is not enabled for you; enabled: {shown}; {how}{said}")


def check_bounds(op: PassOp, bounds: Mapping[str, Bounds]) -> None:
    """Raise InvalidRequest for a pass with a setting out of bounds: given, default, or a tensor in its place.

    Where every datum has a tensor of its own, the setting is judged all the same.
    """
    loss = op.loss
    for key, (low, high) in bounds.items():
        value = loss.config.get(key)
        # A bound of a setting that this server's version of the loss does not have.
        if value is None:
            continue
        if not low <= value <= high:
            raise InvalidRequest(
                f"loss_fn_config {key}={value} of {loss.name} is outside the bounds that are set for you, {low} to "
                f"{high}{_if_default(loss, key, value)}"
            )
        if key in PER_TOKEN_CLIPS:
            for index, datum in enumerate(op.datums):
                if key in datum.inputs:
                    _check_column(loss.name, index, key, datum.inputs[key], (low, high))


def check_operations(loss: CustomLoss, disabled: Collection[str]) -> None:
    """Raise InvalidRequest, naming the operation, for a graph that calls one that is switched off."""
    if not disabled:
        return
    for node in loss.nodes:
        name = _operation(node)
        if name in disabled:
            raise InvalidRequest(
                f"custom loss {loss.name[:80]!r}: {name} (node {node.name[:80]!r}) is switched off on this server; "
                "GET /api/v1/losses lists the operations"
            )


def aliases_of(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """What a run's metadata says of losses: the name that passes send, and the loss that it is there.

    Raises InvalidRequest for a name that is no built-in loss.
    """
    aliases: dict[str, str] = {}
    for key, loss in metadata.items():
        if not key.startswith(ALIAS_PREFIX):
            continue
        name = key.removeprefix(ALIAS_PREFIX)
        if name not in LOSSES:
            known = ", ".join(LOSSES)
            raise InvalidRequest(f"user_metadata {key[:100]!r} is about loss_fn {name[:80]!r}, not one of {known}")
        if loss == CUSTOM:
            raise InvalidRequest(
                f"user_metadata {key!r} says {CUSTOM!r}, which needs a loss_id; name a built-in loss or an approved one"
            )
        aliases[name] = loss
    return aliases


def check_rule(loss: str, rule: LossRule) -> None:
    """Raise InvalidRequest for a rule that no loss has, or that says nothing."""
    if loss not in RULED_LOSSES:
        raise InvalidRequest(
            f"loss {loss[:80]!r} has no rules; those that have are {', '.join(RULED_LOSSES)}. "
            "Who may use a named loss is said when it is approved"
        )
    if rule.is_enabled is None and not rule.bounds:
        raise InvalidRequest("a rule says is_enabled, bounds or both; DELETE removes it")
    settings = LOSSES[loss].config_defaults if loss in LOSSES else {}
    for key, (low, high) in rule.bounds.items():
        if key not in settings:
            known = ", ".join(settings) or "none"
            raise InvalidRequest(f"bounds of {key[:80]!r}: {loss} has no such setting; it has {known}")
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise InvalidRequest(f"bounds of {key} are {low} to {high}; send two finite numbers, low and high")


def check_disabled(names: Collection[str]) -> None:
    """Raise InvalidRequest for the name of an operation that does not exist."""
    unknown = sorted(set(names) - OPERATIONS)
    if unknown:
        raise InvalidRequest(
            f"{unknown[0][:80]!r} is not an operation; they are named like torch.exp, Tensor.exp, operator.mul "
            "(GET /admin/v1/losses/operations)"
        )


def operations_of(loss: CustomLoss) -> Iterator[str]:
    """The operations that a graph calls, by their names in OPERATIONS."""
    return (name for node in loss.nodes if (name := _operation(node)))


def _operation(node: Node) -> str:
    match node.op:
        case NodeOp.CALL_FUNCTION:
            return canonical_function(node.target)
        case NodeOp.CALL_METHOD:
            return _METHOD + node.target
    return ""


def _check_column(name: str, datum_index: int, key: str, values: NDArray[np.generic], bounds: Bounds) -> None:
    # The bounds as float32, like the values: 0.2 is a little more there.
    low, high = (np.float32(bound) for bound in bounds)
    is_outside = (values < low) | (values > high)
    if is_outside.any():
        index = int(np.argmax(is_outside))
        raise InvalidRequest(
            f"datum {datum_index}: {key}[{index}] = {values.flat[index]} of {name} is outside the bounds that are "
            f"set for you, {low} to {high}"
        )


def _if_default(loss: Loss, key: str, value: float) -> str:
    return "; it is the default, so send one within them" if value == LOSSES[loss.name].config_defaults[key] else ""
