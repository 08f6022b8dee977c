"""API keys: how one is minted and how it is recognised. Only digests are ever stored or logged."""

from __future__ import annotations

import hashlib
import re
import secrets

from treadle.errors import InvalidRequest

KEY_PREFIX = "tml-"
_KEY_BYTES = 32
_MAX_NAME_CHARS = 128
# What new_key makes: so many bytes in base64.
_OWN_FORM = re.compile(re.escape(KEY_PREFIX) + r"[A-Za-z0-9_-]{43}")


def new_key() -> str:
    """A fresh key with 256 random bits and the prefix that the SDK insists on."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def checked_key_name(name: str) -> str:
    """`name` itself when people can read it. Raises InvalidRequest."""
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(
            f"the name {name[:140]!r} of a key is not allowed: use 1 to {_MAX_NAME_CHARS} printable characters"
        )
    return name


def is_own_form(text: str) -> bool:
    """Whether this can only be a key of a server like this one, whether or not anybody made it."""
    return _OWN_FORM.fullmatch(text) is not None


def key_digest(raw_key: str) -> str:
    """SHA-256 of a key, hex. Keys are uniformly random, so a plain hash is enough."""
    return hashlib.sha256(raw_key.encode()).hexdigest()
