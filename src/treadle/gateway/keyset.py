"""Cursors of keyset pages: the place behind which the next page begins, as one opaque word.

It refuses to know what is listed. Invariant: only what `cursor_of` made is read back, with the types it was made of.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Any

import orjson

from treadle.errors import InvalidRequest

MAX_CURSOR_CHARS = 4_096
# Far above any number that is listed, far below the largest one of a column: something may be added to it.
_MAX_INTEGER = 2**62


def cursor_of(place: Sequence[str | int | float]) -> str:
    """The cursor of a place."""
    return base64.urlsafe_b64encode(orjson.dumps(list(place))).decode().rstrip("=")


def place_of(cursor: str, *types: type[str | int | float]) -> tuple[Any, ...]:
    """The place of a cursor that has values of these types. Raises InvalidRequest."""
    try:
        values = orjson.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        values = None
    if not isinstance(values, list) or [type(value) for value in values] != list(types):
        raise _not_ours(cursor)
    if not all(_is_storable(value) for value in values):
        raise _not_ours(cursor)
    return tuple(values)


def _is_storable(value: str | int | float) -> bool:
    match value:
        case str():
            return "\0" not in value
        case int():
            return abs(value) <= _MAX_INTEGER
        case _:
            return math.isfinite(value)


def _not_ours(cursor: str) -> InvalidRequest:
    return InvalidRequest(f"after={cursor[:80]!r} is not the `next` of a page of this listing")
