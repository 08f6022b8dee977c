"""Answers about losses, as models: to users, what they may run; to operators, what there is and what is decided."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from treadle.wire.answers import Answer


class LossSettingAnswer(Answer):
    """A key of loss_fn_config."""

    name: str
    default: float
    low: float | None
    """The lowest value that is allowed; null when nobody bounded it."""
    high: float | None


class BuiltInLossAnswer(Answer):
    """A loss of this server, and what it reads of a datum's loss_fn_inputs."""

    name: str
    is_enabled: bool
    """For the caller; for operators: where no narrower scope says otherwise."""
    required_inputs: list[str]
    optional_inputs: list[str]
    settings: list[LossSettingAnswer]


class TracedLossesAnswer(Answer):
    """Losses that a client traces and registers with create_custom_loss."""

    is_enabled: bool
    operations: list[str]
    """What their graphs may call, without what operators switched off."""


class LossInputAnswer(Answer):
    name: str
    rank: int
    """0 is a scalar, 1 is [T], 2 is [T, K]."""


class NamedLossAnswer(Answer):
    """A loss that somebody submitted and an operator approved for the caller."""

    name: str
    inputs: list[LossInputAnswer]
    """`logprobs`, which the server computes, and keys of loss_fn_inputs; target_tokens is always needed."""
    definition_sha256: str


class OwnLossAnswer(Answer):
    """A submission of the caller's."""

    name: str
    status: Literal["pending", "approved", "rejected", "revoked"]
    reason: str | None
    submitted_at: datetime


class LossesAnswer(Answer):
    """What the caller may name as loss_fn, and how."""

    built_in: list[BuiltInLossAnswer]
    traced: TracedLossesAnswer
    named: list[NamedLossAnswer]
    submitted: list[OwnLossAnswer]
    """The newest hundred, newest first."""


class LossRuleAnswer(Answer):
    """What one scope says about one loss."""

    scope: str
    """default, organization:NAME or tenant:ID."""
    loss: str
    is_enabled: bool | None
    """null: as the next wider scope says."""
    bounds: dict[str, tuple[float, float]]
    """Lowest and highest value of settings."""


class LossRulesAnswer(Answer):
    """The losses that have rules, the rules, and the operations that are switched off."""

    built_in: list[BuiltInLossAnswer]
    """As for a tenant that no rule names, in no organisation."""
    traced_is_enabled: bool
    """For such a tenant."""
    rules: list[LossRuleAnswer]
    """By scope and loss."""
    disabled_operations: list[str]


class LossOperationsAnswer(Answer):
    """The operations that graphs of losses may call."""

    operations: list[str]
    """All that this server has, switched off or not."""
    disabled: list[str]
