"""Which session a tenant's text requests run in, as far as this gateway remembers; the store has the truth."""

from __future__ import annotations

from treadle.domain.ids import SessionId, TenantId
from treadle.gateway.caches import RecentRows

# Tenants remembered; for others the store is asked, which costs a write.
_MAX_TENANTS = 8_192


class TextSessions:
    """By tenant: its open session, and how many were finished before it."""

    def __init__(self) -> None:
        self._open: RecentRows[TenantId, SessionId] = RecentRows(_MAX_TENANTS)
        self._num_finished: RecentRows[TenantId, int] = RecentRows(_MAX_TENANTS)

    def get(self, tenant_id: TenantId) -> SessionId | None:
        return self._open.get(tenant_id)

    def num_finished(self, tenant_id: TenantId) -> int:
        """How many of the tenant's sessions are known to be finished."""
        return self._num_finished.get(tenant_id) or 0

    def put(self, tenant_id: TenantId, session_id: SessionId) -> None:
        self._open.put(tenant_id, session_id)

    def finished(self, tenant_id: TenantId, count: int) -> None:
        """The open one was finished; `count` of them are."""
        self._open.forget(tenant_id)
        self._num_finished.put(tenant_id, count)
