"""Who calls, once that is known."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.config import AuthMethod
from treadle.domain.ids import TenantId


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. Everything it creates belongs to `tenant_id`.

    key_digest: of the key or token behind it. key_id: of a created key; None for any other. user: as people call it.
    organization: whose member it is; None for nobody's. method: the authenticator that knows it.
    """

    tenant_id: TenantId
    key_digest: str = ""
    key_id: int | None = None
    user: str = ""
    is_admin: bool = False
    organization: str | None = None
    method: AuthMethod = "open"

    @property
    def actor(self) -> str:
        """Who did it, for the audit log."""
        return self.tenant_id if self.key_id is None else f"{self.tenant_id} (key {self.key_id})"

    @property
    def user_urn(self) -> str:
        """The name of its user in answers of the API."""
        return urn_of(self.tenant_id)


def urn_of(tenant_id: TenantId) -> str:
    """The name of a tenant in answers of the API: "tml:user:alice", "tml:open:0123456789abcdef"."""
    return f"tml:{tenant_id}"
