"""Tokens that this server signs and later believes: logins (JWT), and URLs that work without a key.

All gateways of a database share one secret, so any of them reads what another one signed. It refuses to know what a
token is for, and keeps nothing. Invariant: what was signed for one purpose is worth nothing for another, and nothing
at all once its time is up.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import jwt

from treadle.gateway.deps import Clock
from treadle.store import Store

# Its name in the table of secrets. Deleting that row ends every login and every signed URL.
SECRET_NAME = "signing"
_ALGORITHM = "HS256"
_SECRET_BYTES = 32
_TIMES = ("exp", "iat", "aud")


class BadToken(Exception):
    """Not signed here, not for this purpose, or expired. Callers answer it in their own words."""


class Signer:
    """Signs and verifies for one store. The tokens are JWTs, whose letters are safe in URLs."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._key: str | None = None

    async def sign(self, purpose: str, data: Mapping[str, Any], *, expires_at: float) -> str:
        """A token that holds `data` (JSON, readable by whoever has the token) until `expires_at`, in epoch seconds."""
        assert not set(_TIMES) & set(data), "these names are the token's own"
        times = {"aud": purpose, "iat": int(self._clock.now()), "exp": int(expires_at)}
        return jwt.encode({**data, **times}, await self._secret(), algorithm=_ALGORITHM)

    async def verify(self, purpose: str, token: str) -> dict[str, Any]:
        """What was signed, and the claims `iat` and `exp`. Raises BadToken."""
        # PyJWT would ask the machine's clock.
        options: Any = {"require": list(_TIMES), "verify_exp": False, "verify_iat": False, "verify_sub": False}
        try:
            claims: dict[str, Any] = jwt.decode(
                token, await self._secret(), algorithms=[_ALGORITHM], audience=purpose, options=options
            )
        except (jwt.InvalidTokenError, ValueError) as error:
            raise BadToken from error
        if not isinstance(claims["exp"], int) or claims["exp"] <= self._clock.now():
            raise BadToken
        return claims

    async def _secret(self) -> str:
        if self._key is None:
            self._key = await self._store.secrets.get_or_create(SECRET_NAME, lambda: secrets.token_hex(_SECRET_BYTES))
        return self._key
