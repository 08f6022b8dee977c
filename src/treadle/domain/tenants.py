"""Tenants and organisations as operators see them. It refuses to know how they came to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.domain.backlog import Load
from treadle.domain.fairness import WeightClass
from treadle.domain.ids import TenantId
from treadle.domain.usage import UsageKind

# Tenants whose id is a kind and the name of one user, as people say it.
_OF_USERS = ("user", "ms")


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """One tenant. source: how it came here (keys, modelscope, open, admin); None: nobody noted it.

    created_at, updated_at: of what is stored about it; None for a tenant that only has sessions.
    """

    tenant_id: TenantId
    weight_class: WeightClass = WeightClass.STANDARD
    organization: str | None = None
    source: str | None = None
    is_suspended: bool = False
    suspended_reason: str | None = None
    created_at: float | None = None
    updated_at: float | None = None


@dataclass(frozen=True, slots=True)
class TenantChange:
    """What an operator changes of a tenant; None leaves a field as it is. organization "": it leaves its own."""

    weight_class: WeightClass | None = None
    organization: str | None = None
    is_suspended: bool | None = None
    suspended_reason: str | None = None


@dataclass(frozen=True, slots=True)
class TenantStanding:
    """What a tenant has and does now.

    num_keys: that can be used. num_live_runs: created and neither unloaded nor lost. queued: samples under True,
    training ops under False. usage_today: since midnight UTC, in the units of UsageKind.
    """

    num_keys: int
    num_live_runs: int
    num_active_sessions: int
    num_checkpoints: int
    checkpoint_bytes: int
    queued: Mapping[bool, Load] = field(default_factory=dict)
    usage_today: Mapping[UsageKind, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OrganizationRecord:
    """One organisation. created_at None: tenants name it, and no operator described it."""

    name: str
    description: str
    num_tenants: int
    created_at: float | None = None


def user_of(tenant_id: TenantId) -> str:
    """The name of a tenant as people say it: "alice" of "user:alice"; of any other kind the id itself."""
    kind, _, name = tenant_id.partition(":")
    return name if kind in _OF_USERS and name else tenant_id
