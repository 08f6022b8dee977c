"""Tenants as people write them, turned into ids. It refuses to know whether there is such a tenant."""

from __future__ import annotations

from treadle.domain.ids import TenantId
from treadle.gateway.auth import urn_of

_URN = urn_of(TenantId(""))
# What ids of tenants that are users begin with: those with a key of this server, and those of ModelScope.
_OF_USERS = ("user", "ms")


def tenant_of_urn(urn: str) -> TenantId | None:
    """The tenant that answers of the API call so, "tml:user:alice"; None for what is no such name."""
    return TenantId(urn.removeprefix(_URN)) if urn.startswith(_URN) and urn != _URN else None


def tenants_named(text: str) -> tuple[TenantId, ...]:
    """Whom a person may mean: one by its name in answers or by its id ("user:alice"); by a bare user name ("alice")
    whoever has it, wherever users come from."""
    named = tenant_of_urn(text)
    if named is not None:
        return (named,)
    return (TenantId(text),) if ":" in text else tuple(TenantId(f"{kind}:{text}") for kind in _OF_USERS)
