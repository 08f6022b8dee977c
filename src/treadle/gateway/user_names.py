"""Tenants as people write them, turned into ids. It refuses to know whether there is such a tenant."""

from __future__ import annotations

from treadle.domain.ids import TenantId
from treadle.gateway.auth import urn_of

_URN = urn_of(TenantId(""))


def tenant_of_urn(urn: str) -> TenantId | None:
    """The tenant that answers of the API call so, "tml:user:alice"; None for what is no such name."""
    return TenantId(urn.removeprefix(_URN)) if urn.startswith(_URN) and urn != _URN else None


def tenant_named(text: str) -> TenantId:
    """The tenant that a person means: by its name in answers, its id ("user:alice"), or a bare user name ("alice")."""
    named = tenant_of_urn(text)
    if named is not None:
        return named
    return TenantId(text if ":" in text else f"user:{text}")
