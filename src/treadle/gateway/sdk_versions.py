"""Which version of the SDK asks, where that decides what it may be told.

A client that does not say is taken for a newest one: only an answer that an old SDK is known to fail on is changed.
"""

from __future__ import annotations

from typing import TypeAlias

from starlette.requests import Request

Version: TypeAlias = tuple[int, ...]

# Sent by every SDK with every request.
VERSION_HEADER = "x-stainless-package-version"
NEWEST: Version = (2**31,)
# The first SDK whose checkpoints may be of type "external"; earlier ones refuse a whole list for one of them.
EXTERNAL_SINCE: Version = (0, 28)


def parsed_version(text: str) -> Version:
    """ "0.38.0" as (0, 38, 0); () for anything else, which is older than every version."""
    parts = text.split(".")
    is_plain = all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts)
    return tuple(int(part) for part in parts) if is_plain else ()


def version_of(request: Request) -> Version:
    """The version that a request came from; NEWEST when it names none that can be read."""
    return parsed_version(request.headers.get(VERSION_HEADER, "")) or NEWEST
