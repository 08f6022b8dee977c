"""The `limit` and `offset` of listings. Invariant: a page is never larger than the store hands out."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.errors import InvalidRequest

MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Page:
    """A slice of a listing."""

    limit: int
    offset: int

    def cursor(self, total: int) -> dict[str, int]:
        """The cursor object of the SDK's listings."""
        return {"offset": self.offset, "limit": self.limit, "total_count": total}


def page_of(request: Request, *, default_limit: int) -> Page:
    """The page that the query string asks for. Raises InvalidRequest."""
    return Page(
        limit=_number(request, "limit", default_limit, lowest=1, highest=MAX_PAGE_ROWS),
        offset=_number(request, "offset", 0, lowest=0, highest=MAX_OFFSET),
    )


def _number(request: Request, name: str, default: int, *, lowest: int, highest: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not lowest <= number <= highest:
        raise InvalidRequest(f"{name}={text[:40]!r} is not an integer in {lowest} to {highest}")
    return number
