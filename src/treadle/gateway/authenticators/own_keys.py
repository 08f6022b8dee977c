"""Keys that this server's operators created: found in the store, and remembered for moments.

It refuses to see a key; it knows digests. Invariants: a revoked or changed key is noticed within KEY_CACHE_S on every
gateway, and one whose time is up at once; neither ever becomes an unknown key again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.errors import Unauthenticated
from treadle.gateway.authenticators.principal import Principal
from treadle.gateway.caches import ConfirmedRows
from treadle.gateway.deps import Clock
from treadle.store import Store

# How long a known key is believed without asking the store: two reads per second for all keys, not one per request.
# Half of the second within which a revocation must work everywhere; the other half is for the read.
KEY_CACHE_S = 0.5
MAX_CACHED_KEYS = 4_096
UNKNOWN_KEY = "this API key is not known to the server, or was revoked: create one with `treadle keys create USER`"
_EXPIRED = "this API key has expired: ask for another one, or create it with `treadle keys create USER`"


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    expires_at: float | None


class OwnKeys:
    """See the module."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._known: ConfirmedRows[str, _Known] = ConfirmedRows(
            capacity=MAX_CACHED_KEYS, lifetime_s=KEY_CACHE_S, clock=clock, ended=self._ended_among
        )

    async def find(self, digest: str) -> Principal | None:
        """Whose key this is; None when it is nobody's. Raises Unauthenticated for one that has ended."""
        known = await self._known.get(digest)
        if known is None:
            known = await self._read(digest)
        if known is None:
            return None
        if known.expires_at is not None and known.expires_at <= self._clock.now():
            raise Unauthenticated(_EXPIRED)
        return known.principal

    def forget(self, digest: str) -> None:
        """This key was just changed or ended; ask the store about it."""
        self._known.forget(digest)

    def forget_id(self, key_id: int) -> None:
        """The same, for whoever knows no digest."""
        for digest, known in self._known.believed():
            if known.principal.key_id == key_id:
                self._known.forget(digest)

    async def _read(self, digest: str) -> _Known | None:
        read_at = self._clock.monotonic()
        record = await self._store.keys.find(digest)
        if record is None:
            return None
        if record.revoked_at is not None:
            raise Unauthenticated(UNKNOWN_KEY)
        principal = Principal(
            tenant_id=record.tenant_id,
            key_digest=digest,
            key_id=record.key_id,
            user=record.user,
            is_admin=record.is_admin,
            method="keys",
        )
        known = _Known(principal, record.expires_at)
        self._known.put(digest, known, read_at=read_at)
        return known

    async def _ended_among(self, digests: Sequence[str]) -> set[str]:
        """Those that were revoked, or end at another time than is known."""
        expiries = await self._store.keys.expiries(digests)
        believed = dict(self._known.believed())
        return {
            digest
            for digest in digests
            if digest not in expiries or (digest in believed and believed[digest].expires_at != expiries[digest])
        }
