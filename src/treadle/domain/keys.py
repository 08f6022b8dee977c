"""API keys: how one is minted and how it is recognised. Only digests are ever stored or logged."""

from __future__ import annotations

import hashlib
import secrets

KEY_PREFIX = "tml-"


def new_key() -> str:
    """A fresh key with 256 random bits and the prefix that the SDK insists on."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_digest(raw_key: str) -> str:
    """SHA-256 of a key, hex. Keys are uniformly random, so a plain hash is enough."""
    return hashlib.sha256(raw_key.encode()).hexdigest()
