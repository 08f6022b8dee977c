"""Large JSON bodies of numbers, read without ever having all of their numbers as Python objects.

A JSON parser holds the interpreter for as long as it runs (measured: 60 ms for 5 MB), whatever thread it runs in, and
makes 10 to 20 bytes of objects for one of text. So the flat lists of numbers, which are nearly all of such a body, are
cut out before it is parsed, and parsed afterwards in pieces of a bounded size. Knows no passes and no tensors.

Invariant: what is read is what a JSON parser would have read; text that is not JSON is refused wherever it stands.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

import orjson

from treadle.errors import BodyTooLarge, UnreadableBody
from treadle.wire.bodies import json_object

# Text that is parsed at once: about a millisecond.
PIECE_BYTES = 64 * 2**10
# What remains of a body without its numbers: some hundred bytes per datum, of which there are thousands at most.
MAX_SKELETON_BYTES = 4 * 2**20

# A key and its flat list. It cannot match inside a text: a quote there has a backslash in front.
_FLAT_LIST = re.compile(
    rb'[{,]\s*"(?:tokens|data|shape|sparse_crow_indices|sparse_col_indices)"\s*:\s*(\[[^\[\]{}"]+\])'
)


class NumberText:
    """A body's fields, with the texts of its flat lists in place of those lists."""

    __slots__ = ("_mark", "_raw", "_spans", "fields")

    def __init__(self, raw: bytes) -> None:
        """Raises UnreadableBody for anything but a JSON object, BodyTooLarge for one with too little else in it."""
        self._raw = raw
        # No client can name a list by guessing it.
        self._mark = secrets.token_hex(16)
        self._spans: list[tuple[int, int]] = [match.span(1) for match in _FLAT_LIST.finditer(raw)]
        parts: list[bytes] = []
        end = 0
        for index, (start, stop) in enumerate(self._spans):
            parts += (raw[end:start], f'"{self._mark}{index}"'.encode())
            end = stop
        skeleton = b"".join([*parts, raw[end:]])
        if len(skeleton) > MAX_SKELETON_BYTES:
            raise BodyTooLarge(
                f"the body has {len(skeleton)} bytes beside its lists of numbers; allowed are {MAX_SKELETON_BYTES}"
            )
        self.fields: dict[str, Any] = json_object(skeleton)

    def pieces(self, value: object) -> Iterator[list[Any]] | None:
        """The items of a list of the body, some thousand at a time; None for a field that is no list.

        The iterator raises UnreadableBody where the text is not JSON.
        """
        if isinstance(value, list):
            return iter((value,))
        if isinstance(value, str) and value.startswith(self._mark):
            start, stop = self._spans[int(value.removeprefix(self._mark))]
            return self._parsed(start + 1, stop - 1)
        return None

    def _parsed(self, start: int, stop: int) -> Iterator[list[Any]]:
        while start < stop:
            cut = stop if stop - start <= PIECE_BYTES else self._raw.rfind(b",", start, start + PIECE_BYTES)
            if cut < 0:
                raise UnreadableBody("the body has a number of absurd length")
            yield _list(self._raw[start:cut])
            if cut < stop and cut + 1 == stop:
                raise UnreadableBody("the body has a list that ends in a comma")
            start = cut + 1


def _list(items: bytes) -> list[Any]:
    text = b"[" + items + b"]"
    try:
        return orjson.loads(text)  # type: ignore[no-any-return]  # the brackets make it a list
    except orjson.JSONDecodeError:
        pass
    try:
        # NaN and Infinity, which Python writes, and integers beyond 64 bits.
        return json.loads(text)  # type: ignore[no-any-return]
    except ValueError:
        raise UnreadableBody("the body is not JSON: one of its lists of numbers is damaged") from None
