"""Who is calling: an API key becomes a principal.

It knows keys by their SHA-256 only; a raw key is never stored, logged or put into a message.
Open mode (no key was ever created, loopback bind): every `tml-` key is a tenant of its own. The first
created key ends it for good. Invariant: a revoked key is refused within KEY_CACHE_S of its revocation.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers

from treadle.domain.ids import TenantId
from treadle.domain.keys import KEY_PREFIX, key_digest
from treadle.errors import Unauthenticated
from treadle.gateway.caches import ConfirmedRows
from treadle.gateway.deps import Clock, GatewaySettings
from treadle.store import Store

# How long a known key is believed without asking the store: one read per second for all keys, not one per request.
KEY_CACHE_S = 1.0
# How long "no key was ever created" is believed; creating the first key must end open mode within a second.
OPEN_CACHE_S = 0.5
MAX_CACHED_KEYS = 4_096
# Minted keys have 47 characters; anything much longer is not one, and hashing it would be work for nothing.
MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. Everything it creates belongs to `tenant_id`."""

    tenant_id: TenantId
    is_admin: bool = False


class Authenticator:
    """Turns request headers into a Principal, with a small cache in front of the store."""

    def __init__(self, *, store: Store, settings: GatewaySettings, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._known: ConfirmedRows[str, Principal] = ConfirmedRows(
            capacity=MAX_CACHED_KEYS, lifetime_s=KEY_CACHE_S, clock=clock, ended=store.keys.revoked_among
        )
        self._any_key = False
        self._any_key_checked_at = float("-inf")

    async def principal(self, headers: Headers) -> Principal:
        """The caller. Raises Unauthenticated without a key, or with one that nobody holds."""
        digest = key_digest(_key_of(headers))
        if await self._is_open():
            return Principal(tenant_id=TenantId(f"open:{digest[:16]}"))
        cached = await self._known.get(digest)
        if cached is not None:
            return cached
        read_at = self._clock.monotonic()
        record = await self._store.keys.find(digest)
        if record is None or record.revoked_at is not None:
            raise Unauthenticated(
                "this API key is not known to the server, or was revoked: create one with `treadle keys create USER`"
            )
        principal = Principal(tenant_id=record.tenant_id, is_admin=record.is_admin)
        self._known.put(digest, principal, read_at=read_at)
        return principal

    async def _is_open(self) -> bool:
        if not self._settings.is_loopback or self._settings.auth_mode == "keys":
            return False
        if self._settings.auth_mode == "open":
            return True
        now = self._clock.monotonic()
        if not self._any_key and now - self._any_key_checked_at >= OPEN_CACHE_S:
            # Sticky once true: revoking the last key must not open the door again.
            self._any_key = await self._store.keys.any_ever()
            self._any_key_checked_at = now
        return not self._any_key


def _key_of(headers: Headers) -> str:
    """The key as sent: X-API-Key (the SDK), else Authorization: Bearer (plain HTTP clients)."""
    key = headers.get("x-api-key")
    if key is None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else None
    if not key:
        raise Unauthenticated("no API key: send it as the header X-API-Key (or Authorization: Bearer)")
    if not key.startswith(KEY_PREFIX) or len(key) > MAX_KEY_CHARS:
        raise Unauthenticated(f"this is not an API key of this server: keys start with {KEY_PREFIX!r}")
    return key
