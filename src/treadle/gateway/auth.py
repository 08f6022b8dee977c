"""Who is calling: a key or token that a request presents becomes a principal.

It asks the authenticators that the settings name (authenticators/), cheapest first: keys of operators, what is known of
tokens of ModelScope, open mode (`tml-` keys on loopback, each a tenant of its own), ModelScope itself. Secrets are
known by their SHA-256 only; a raw one is never stored, logged or put into a message. A token that was given out (JWT)
names the method and the digest of what it stands for and nothing else that counts, so it is worth what that is worth
now. Without methods in the settings, open mode lasts until the first key is created, and never comes back. Invariants:
a revoked key, and every token of it, is refused within KEY_CACHE_S of its revocation; a suspended tenant is refused,
whatever it presents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import Headers

from treadle.config import AuthMethod
from treadle.domain.ids import TenantId
from treadle.domain.keys import KEY_PREFIX, is_own_form, key_digest
from treadle.domain.limits import JWT_LIFE_S
from treadle.errors import Forbidden, InvalidToken, NotSupported, Unauthenticated
from treadle.gateway.authenticators.modelscope import ModelScopeTokens
from treadle.gateway.authenticators.own_keys import KEY_CACHE_S, MAX_CACHED_KEYS, UNKNOWN_KEY, OwnKeys
from treadle.gateway.authenticators.principal import Principal, urn_of
from treadle.gateway.caches import RecentRows
from treadle.gateway.deps import Clock, GatewaySettings
from treadle.gateway.signing import BadToken, Signer
from treadle.store import Store
from treadle.store.policy_watch import PolicyWatch

__all__ = ["KEY_CACHE_S", "OPEN_CACHE_S", "Authenticator", "Principal", "urn_of"]

# How long "no key was ever created" is believed; creating the first key must end open mode within a second.
OPEN_CACHE_S = 0.5
# Minted keys have 47 characters; anything much longer is not one, and hashing it would be work for nothing.
MAX_KEY_CHARS = 512
# Ours have some 400 characters.
MAX_JWT_CHARS = 2_048
# How every JWT begins: a JSON object in base64.
JWT_PREFIX = "eyJ"
# SDKs exchange their token anew at half the life of a JWT, and all the time when less than a minute of it is left.
_MIN_JWT_LIFE_S = 120.0
_LOGIN = "login"
_DIGEST = "key"
_METHOD = "via"
_BAD_TOKEN = "this token has expired, or its key was revoked: get a new one for your API key"


@dataclass(frozen=True, slots=True)
class _Login:
    """What a token says."""

    digest: str
    method: AuthMethod
    expires_at: float


class Authenticator:
    """Turns what a request presents into a Principal. `close` ends it."""

    def __init__(
        self, *, store: Store, settings: GatewaySettings, clock: Clock, signer: Signer, policies: PolicyWatch
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._signer = signer
        self._policies = policies
        methods = settings.auth_methods
        self._keys = OwnKeys(store=store, clock=clock) if not methods or "keys" in methods else None
        self._modelscope = (
            ModelScopeTokens(store=store, settings=settings.modelscope, clock=clock, policies=policies)
            if "modelscope" in methods
            else None
        )
        # Digests of keys in open mode that nobody created, and the monotonic times at which that was found.
        self._uncreated: RecentRows[str, float] = RecentRows(MAX_CACHED_KEYS)
        # Verified tokens, by their digest.
        self._logins: RecentRows[str, _Login] = RecentRows(MAX_CACHED_KEYS)
        self._any_key = False
        self._any_key_checked_at = float("-inf")

    async def close(self) -> None:
        """Idempotent."""
        if self._modelscope is not None:
            await self._modelscope.close()

    async def principal(self, headers: Headers, address: str = "") -> Principal:
        """The caller; address: of the client, as far as it is known.

        Raises Unauthenticated without a key, or with one that nobody holds, and as `principal_of`.
        """
        return await self.principal_of(presented(headers), address=address)

    async def principal_of(self, token: str, *, address: str = "") -> Principal:
        """Who holds this key, or this token: the one place that decides it. address: of whoever shows it, or a name.

        Raises Unauthenticated, Forbidden for a suspended tenant and for users who are no members, and AuthUnavailable
        while a token cannot be checked.
        """
        return self._admitted(await self._holder(token, address))

    async def token_for(self, headers: Headers, address: str = "") -> str:
        """A token that stands for the caller, whose key it names, for an hour, or as long as a verdict is believed.

        One that was asked for with a token ends with that one: only a key begins another hour. Raises as
        `principal_of`, and NotSupported when the server gives out none.
        """
        credential = presented(headers)
        principal = await self.principal_of(credential, address=address)
        if not self._settings.has_jwt:
            raise NotSupported("this server issues no tokens; send the API key itself with every request")
        expires_at = self._clock.now() + self._jwt_life_s(principal)
        if credential.startswith(JWT_PREFIX):
            expires_at = min(expires_at, (await self._login(credential)).expires_at)
        claims: dict[str, Any] = {
            "sub": principal.user_urn,
            "org_id": principal.organization or principal.tenant_id,
            _DIGEST: principal.key_digest,
            _METHOD: principal.method,
        }
        return await self._signer.sign(_LOGIN, claims, expires_at=expires_at)

    def forget(self, principal: Principal) -> None:
        """Its key was just revoked; believe it no longer."""
        if self._keys is not None:
            self._keys.forget(principal.key_digest)

    def forget_key(self, key_id: int) -> None:
        """This key was just changed or revoked; believe what was known of it no longer."""
        if self._keys is not None:
            self._keys.forget_id(key_id)

    async def _holder(self, token: str, address: str) -> Principal:
        if token.startswith(JWT_PREFIX):
            return await self._of_login(token)
        if len(token) <= MAX_KEY_CHARS and token.startswith(KEY_PREFIX):
            return await self._of_key(token, address)
        if len(token) <= MAX_KEY_CHARS and self._modelscope is not None:
            return await self._modelscope.principal(token, address=address)
        raise Unauthenticated(f"this is not an API key of this server: keys start with {KEY_PREFIX!r}")

    def _admitted(self, principal: Principal) -> Principal:
        """The principal, with the organisation that it is in now. Raises Forbidden while its tenant is suspended."""
        policies = self._policies.now
        reason = policies.suspended.get(principal.tenant_id)
        if reason is not None:
            raise Forbidden(f"{principal.tenant_id} is suspended on this server{f': {reason}' if reason else ''}")
        organization = policies.organizations.get(principal.tenant_id)
        return principal if organization == principal.organization else replace(principal, organization=organization)

    async def _of_key(self, key: str, address: str) -> Principal:
        """Of a text that begins like a key, which SDKs also want of other tokens."""
        bare = key[len(KEY_PREFIX) :]
        if self._modelscope is None or not self._modelscope.remembers(key_digest(bare)):
            principal = await self._of_digest(key_digest(key))
            if principal is not None:
                return principal
        # What looks like a key of ours is nobody else's business: it may be one of another server.
        if self._modelscope is None or is_own_form(key):
            raise Unauthenticated(UNKNOWN_KEY)
        return await self._modelscope.principal(bare, address=address)

    async def _of_digest(self, digest: str) -> Principal | None:
        """Of a key by its digest: whose it is, or in open mode a tenant of its own. Raises for one that has ended."""
        is_open = await self._is_open()
        # Without methods, there is no key to be found while the door is open.
        if self._keys is not None and not (is_open and self._is_uncreated(digest)):
            principal = await self._keys.find(digest)
            if principal is not None:
                return principal
            if is_open:
                self._uncreated.put(digest, self._clock.monotonic())
        if not is_open:
            return None
        name = f"open:{digest[:16]}"
        return Principal(tenant_id=TenantId(name), key_digest=digest, user=name)

    def _is_uncreated(self, digest: str) -> bool:
        """Whether it was just found, or is sure, that nobody created this key."""
        if not self._settings.auth_methods:
            return True
        found_at = self._uncreated.get(digest)
        return found_at is not None and self._clock.monotonic() - found_at < OPEN_CACHE_S

    async def _of_login(self, token: str) -> Principal:
        """Of a token that was given out. Raises InvalidToken where SDKs help themselves with a new one; Forbidden."""
        if len(token) > MAX_JWT_CHARS:
            raise InvalidToken(_BAD_TOKEN)
        login = await self._login(token)
        try:
            if login.method == "modelscope" and self._modelscope is not None:
                return await self._modelscope.principal_of_digest(login.digest)
            principal = None if login.method == "modelscope" else await self._of_digest(login.digest)
        except Unauthenticated as error:
            raise InvalidToken(_BAD_TOKEN) from error
        if principal is None:
            raise InvalidToken(_BAD_TOKEN)
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
            # Those of the release before name no method: they are of keys.
            login = _Login(digest=claims[_DIGEST], method=claims.get(_METHOD, "keys"), expires_at=claims["exp"])
            self._logins.put(known_as, login)
        if login.expires_at <= self._clock.now():
            raise InvalidToken(_BAD_TOKEN)
        return login

    def _jwt_life_s(self, principal: Principal) -> float:
        """ModelScope's tokens come back before what is known of them is old, so that it can be asked again."""
        if principal.method != "modelscope":
            return JWT_LIFE_S
        return max(_MIN_JWT_LIFE_S, min(JWT_LIFE_S, self._settings.modelscope.verdict_age_s))

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
