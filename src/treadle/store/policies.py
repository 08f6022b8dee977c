"""What operators decided about tenants, read as one picture; and the version that says whether it is still the newest.

Whoever writes a part of it (quotas.py, loss_rules.py, tenants.py, ...) calls `changed` in the same transaction. It
refuses to know what is done about the picture.
"""

from __future__ import annotations

from collections import defaultdict

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.policy import LossRule, Policies, Quota
from treadle.store.engine import Database
from treadle.store.tables import control, loss_rules, named_losses, quotas, tenants

POLICIES = "policies"
# The row of `control` whose value lists the operations of traced losses that are switched off.
LOSS_OPERATIONS = "loss_operations"
_KNOWN_QUOTAS = frozenset(quota.value for quota in Quota)

_VERSION = sa.select(control.c.version).where(control.c.name == POLICIES)
# In words that both databases know: whoever calls `changed` has a connection only. One statement, because two servers
# that both decide something first must not stand in each other's way.
_BUMP = sa.text(
    "INSERT INTO control (name, version, updated_at) VALUES (:name, 1, :now) "
    "ON CONFLICT (name) DO UPDATE SET version = control.version + 1, updated_at = excluded.updated_at"
)
_QUOTAS = sa.select(quotas.c.scope, quotas.c.quota, quotas.c.value)
_RULES = sa.select(loss_rules.c.scope, loss_rules.c.loss, loss_rules.c.is_enabled, loss_rules.c.bounds)
_TENANTS = sa.select(
    tenants.c.tenant_id, tenants.c.organization, tenants.c.is_suspended, tenants.c.suspended_reason
).where(sa.or_(tenants.c.organization.is_not(None), tenants.c.is_suspended))
_OPERATIONS = sa.select(control.c.value).where(control.c.name == LOSS_OPERATIONS)
_STATUSES = sa.select(named_losses.c.definition_sha256, named_losses.c.status).where(
    named_losses.c.definition_sha256.is_not(None)
)


def changed(conn: sa.Connection, now: float) -> None:
    """Say, inside a write transaction, that the picture is about to change."""
    conn.execute(_BUMP, {"name": POLICIES, "now": now})


class PolicyReads:
    """See the module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def version(self) -> int:
        """Of what `read` would return; 0 when no operator decided anything yet."""
        return await self._database.read(lambda conn: conn.execute(_VERSION).scalar_one_or_none()) or 0

    async def read(self) -> Policies:
        """The newest picture. Its version is read first, so a change on the way is read again at the next look."""
        return await self._database.read(_read)


def _read(conn: sa.Connection) -> Policies:
    version = conn.execute(_VERSION).scalar_one_or_none() or 0
    limits: defaultdict[str, dict[Quota, int]] = defaultdict(dict)
    for scope, quota, value in conn.execute(_QUOTAS):
        # One that an older server does not know.
        if quota in _KNOWN_QUOTAS:
            limits[scope][Quota(quota)] = value
    rules: defaultdict[str, dict[str, LossRule]] = defaultdict(dict)
    for scope, loss, is_enabled, bounds in conn.execute(_RULES):
        rules[scope][loss] = LossRule(is_enabled, {key: (low, high) for key, (low, high) in bounds.items()})
    organizations: dict[TenantId, str] = {}
    suspended: dict[TenantId, str] = {}
    for tenant_id, organization, is_suspended, reason in conn.execute(_TENANTS):
        if organization is not None:
            organizations[TenantId(tenant_id)] = organization
        if is_suspended:
            suspended[TenantId(tenant_id)] = reason or ""
    runnable: set[str] = set()
    known: set[str] = set()
    for sha256, status in conn.execute(_STATUSES):
        known.add(sha256)
        if status == "approved":
            runnable.add(sha256)
    return Policies(
        version=version,
        quotas=dict(limits),
        losses=dict(rules),
        organizations=organizations,
        suspended=suspended,
        revoked_losses=frozenset(known - runnable),
        disabled_operations=frozenset(conn.execute(_OPERATIONS).scalar_one_or_none() or ()),
    )
