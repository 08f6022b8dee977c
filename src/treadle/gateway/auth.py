"""Who is calling: an API key, or a token that was given out for one, becomes a principal.

It knows keys by their SHA-256 only; a raw key is never stored, logged or put into a message. A token (JWT) names the
digest of its key and nothing else that counts, so it is worth what that key is worth now.
Open mode (no key was ever created, loopback bind): every `tml-` key is a tenant of its own. The first
created key ends it for good. Invariant: a revoked key, and every token of it, is refused within KEY_CACHE_S of its
revocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from treadle.domain.ids import TenantId
from treadle.domain.keys import KEY_PREFIX, key_digest
from treadle.domain.limits import JWT_LIFE_S
from treadle.errors import InvalidToken, NotSupported, Unauthenticated
from treadle.gateway.caches import ConfirmedRows, RecentRows
from treadle.gateway.deps import Clock, GatewaySettings
from treadle.gateway.signing import BadToken, Signer
from treadle.store import Store

# How long a known key is believed without asking the store: one read per second for all keys, not one per request.
KEY_CACHE_S = 1.0
# How long "no key was ever created" is believed; creating the first key must end open mode within a second.
OPEN_CACHE_S = 0.5
MAX_CACHED_KEYS = 4_096
# Minted keys have 47 characters; anything much longer is not one, and hashing it would be work for nothing.
MAX_KEY_CHARS = 512
# Ours have some 400 characters.
MAX_JWT_CHARS = 2_048
# How every JWT begins: a JSON object in base64.
JWT_PREFIX = "eyJ"
_LOGIN = "login"
_DIGEST = "key"
_UNKNOWN = "this API key is not known to the server, or was revoked: create one with `treadle keys create USER`"
_BAD_TOKEN = "this token has expired, or its key was revoked: get a new one for your API key"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. Everything it creates belongs to `tenant_id`.

    key_digest: of the key behind it. key_id: of a created key; None for any other. user: as people call it.
    organization: whose member it is; None for nobody's. method: the authenticator that knows it.
    """

    tenant_id: TenantId
    key_digest: str = ""
    key_id: int | None = None
    user: str = ""
    is_admin: bool = False
    organization: str | None = None
    method: str = "open"

    @property
    def actor(self) -> str:
        """Who did it, for the audit log."""
        return self.tenant_id if self.key_id is None else f"{self.tenant_id} (key {self.key_id})"

    @property
    def user_urn(self) -> str:
        """The name of its user in answers of the API."""
        return urn_of(self.tenant_id)


@dataclass(frozen=True, slots=True)
class _Login:
    """What a token says."""

    digest: str
    expires_at: float


def urn_of(tenant_id: TenantId) -> str:
    """The name of a tenant in answers of the API: "tml:user:alice", "tml:open:0123456789abcdef"."""
    return f"tml:{tenant_id}"


class Authenticator:
    """Turns what a request presents into a Principal, with a small cache in front of the store."""

    def __init__(self, *, store: Store, settings: GatewaySettings, clock: Clock, signer: Signer) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._signer = signer
        self._known: ConfirmedRows[str, Principal] = ConfirmedRows(
            capacity=MAX_CACHED_KEYS, lifetime_s=KEY_CACHE_S, clock=clock, ended=self._ended
        )
        # Verified tokens, by their digest.
        self._logins: RecentRows[str, _Login] = RecentRows(MAX_CACHED_KEYS)
        self._any_key = False
        self._any_key_checked_at = float("-inf")

    async def _ended(self, digests: Sequence[str]) -> set[str]:
        return set(digests) - set(await self._store.keys.expiries(digests))

    async def principal(self, headers: Headers) -> Principal:
        """The caller. Raises Unauthenticated without a key, or with one that nobody holds."""
        return await self.principal_of(presented(headers))

    async def principal_of(self, token: str) -> Principal:
        """Who holds this key, or this token of a key: the one place that decides it. Raises Unauthenticated."""
        if token.startswith(KEY_PREFIX) and len(token) <= MAX_KEY_CHARS:
            return await self._of_key(key_digest(token))
        if token.startswith(JWT_PREFIX) and len(token) <= MAX_JWT_CHARS:
            login = await self._login(token)
            try:
                return await self._of_key(login.digest)
            except Unauthenticated as error:
                raise InvalidToken(_BAD_TOKEN) from error
        raise Unauthenticated(f"this is not an API key of this server: keys start with {KEY_PREFIX!r}")

    async def token_for(self, headers: Headers) -> str:
        """A token that stands for the caller, whose key it names, for an hour.

        One that was asked for with a token ends with that one: only a key begins another hour. Raises Unauthenticated,
        and NotSupported when the server gives out none.
        """
        credential = presented(headers)
        principal = await self.principal_of(credential)
        if not self._settings.has_jwt:
            raise NotSupported("this server issues no tokens; send the API key itself with every request")
        expires_at = self._clock.now() + JWT_LIFE_S
        if credential.startswith(JWT_PREFIX):
            expires_at = min(expires_at, (await self._login(credential)).expires_at)
        claims: dict[str, Any] = {
            "sub": principal.user_urn,
            "org_id": principal.tenant_id,
            _DIGEST: principal.key_digest,
        }
        return await self._signer.sign(_LOGIN, claims, expires_at=expires_at)

    def forget(self, principal: Principal) -> None:
        """Its key was just revoked; believe it no longer."""
        self._known.forget(principal.key_digest)

    async def _of_key(self, digest: str) -> Principal:
        if await self._is_open():
            name = f"open:{digest[:16]}"
            return Principal(tenant_id=TenantId(name), key_digest=digest, user=name)
        cached = await self._known.get(digest)
        if cached is not None:
            return cached
        read_at = self._clock.monotonic()
        record = await self._store.keys.find(digest)
        if record is None or record.revoked_at is not None:
            raise Unauthenticated(_UNKNOWN)
        principal = Principal(
            tenant_id=record.tenant_id,
            key_digest=digest,
            key_id=record.key_id,
            user=record.user,
            is_admin=record.is_admin,
        )
        self._known.put(digest, principal, read_at=read_at)
        return principal

    async def _login(self, token: str) -> _Login:
        """What a token says. Raises InvalidToken."""
        if not self._settings.has_jwt:
            raise InvalidToken("this server takes no tokens; send the API key itself with every request")
        known_as = key_digest(token)
        login = self._logins.get(known_as)
        if login is None:
            try:
                claims = await self._signer.verify(_LOGIN, token)
            except BadToken as error:
                raise InvalidToken(_BAD_TOKEN) from error
            login = _Login(digest=claims[_DIGEST], expires_at=claims["exp"])
            self._logins.put(known_as, login)
        if login.expires_at <= self._clock.now():
            raise InvalidToken(_BAD_TOKEN)
        return login

    async def _is_open(self) -> bool:
        methods = self._settings.auth_methods
        if not self._settings.is_loopback or (methods and "open" not in methods):
            return False
        if methods:
            return True
        now = self._clock.monotonic()
        if not self._any_key and now - self._any_key_checked_at >= OPEN_CACHE_S:
            # Sticky once true: revoking the last key must not open the door again.
            self._any_key = await self._store.keys.any_ever()
            self._any_key_checked_at = now
        return not self._any_key


def presented(headers: Headers) -> str:
    """The key or token as sent: X-API-Key (the SDK), else a bearer token in Twinkle-Authorization or Authorization.

    Twinkle's clients send the same key with and without its prefix. Raises Unauthenticated when there is none.
    """
    token = headers.get("x-api-key")
    if token is None:
        token = _bearer(headers.get("twinkle-authorization", ""))
        if token and not token.startswith((KEY_PREFIX, JWT_PREFIX)):
            token = KEY_PREFIX + token
    if token is None:
        token = _bearer(headers.get("authorization", ""))
    if not token:
        raise Unauthenticated("no API key: send it as the header X-API-Key (or Authorization: Bearer)")
    return token


def _bearer(header: str) -> str | None:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
