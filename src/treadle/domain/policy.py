"""What operators decided about tenants: limits, losses, suspensions. One immutable picture of it all.

A question is answered by the narrowest scope that says something: the tenant's, its organisation's, the default; where
none does, by the server's settings. It refuses to know who asks and what a limit is compared with.
Invariant: a picture never changes; a newer one has a higher version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from treadle.domain.ids import TENANT_ID, TenantId

ScopeKind = Literal["default", "organization", "tenant"]
# What stands behind the kind: a decision about a tenant "alice", who is user:alice, would hold for nobody.
_NAMES: Mapping[str, re.Pattern[str]] = {
    "default": re.compile(""),
    "organization": re.compile(r"[A-Za-z0-9_.-]+"),
    "tenant": TENANT_ID,
}


class Quota(StrEnum):
    """A limit on one tenant, each with its unit. What is not set is bounded by the server's settings alone."""

    RANK = "max_lora_rank"
    CONTEXT = "max_context_length"
    MODELS = "max_models"
    QUEUED_TOKENS = "max_queued_tokens"
    QUEUED_BYTES = "max_queued_bytes"
    TRAINED_PER_MINUTE = "trained_tokens_per_minute"
    TRAINED_PER_DAY = "trained_tokens_per_day"
    SAMPLED_PER_MINUTE = "sampled_tokens_per_minute"
    SAMPLED_PER_DAY = "sampled_tokens_per_day"
    CHECKPOINTS = "max_checkpoints"
    CHECKPOINT_BYTES = "max_checkpoint_bytes"
    SAMPLES = "max_concurrent_samples"


@dataclass(frozen=True, slots=True)
class Scope:
    """Whom a decision is about. name: of the organisation or the tenant; "" for the default."""

    kind: ScopeKind
    name: str = ""

    def __str__(self) -> str:
        """As it is stored and shown: "default", "organization:acme", "tenant:user:alice"."""
        return self.kind if self.kind == "default" else f"{self.kind}:{self.name}"

    @staticmethod
    def parse(text: str) -> Scope:
        """The inverse of str(). Raises ValueError, also for a name that no tenant and no organisation can have."""
        kind, _, name = text.partition(":")
        if kind in _NAMES and _NAMES[kind].fullmatch(name):
            return Scope(kind, name)  # type: ignore[arg-type]  # one of the three
        raise ValueError(f"{text[:80]!r} is not default, organization:NAME or tenant:ID, such as tenant:user:alice")


DEFAULT_SCOPE = Scope("default")


@dataclass(frozen=True, slots=True)
class LossRule:
    """What one scope says about one loss. is_enabled None: nothing. bounds: lowest and highest value of settings."""

    is_enabled: bool | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policies:
    """The picture. Scopes are keyed by their text.

    organizations: of tenants that have one. suspended: tenants that may do nothing, and why. revoked_losses: SHA-256
    of definitions of named losses that no longer run. disabled_operations: of traced losses.
    """

    version: int = 0
    quotas: Mapping[str, Mapping[Quota, int]] = field(default_factory=dict)
    losses: Mapping[str, Mapping[str, LossRule]] = field(default_factory=dict)
    organizations: Mapping[TenantId, str] = field(default_factory=dict)
    suspended: Mapping[TenantId, str] = field(default_factory=dict)
    revoked_losses: frozenset[str] = frozenset()
    disabled_operations: frozenset[str] = frozenset()

    def scopes_of(self, tenant_id: TenantId) -> Iterator[str]:
        """The scopes that a tenant is in, narrowest first."""
        yield f"tenant:{tenant_id}"
        organization = self.organizations.get(tenant_id)
        if organization is not None:
            yield f"organization:{organization}"
        yield "default"

    def quota(self, tenant_id: TenantId, quota: Quota) -> int | None:
        """The limit of a tenant, None when no operator set one."""
        for scope in self.scopes_of(tenant_id):
            value = self.quotas.get(scope, {}).get(quota)
            if value is not None:
                return value
        return None

    def limits_any(self, *quotas: Quota) -> bool:
        """Whether any scope sets one of these: when none does, nobody need count."""
        return any(quota in values for values in self.quotas.values() for quota in quotas)
