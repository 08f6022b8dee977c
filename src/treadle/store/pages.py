"""Pages of listings: a bounded slice and the total. Knows no table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from treadle.domain.limits import MAX_PAGE_ROWS
from treadle.store.tables import AnyRow


@dataclass(frozen=True, slots=True)
class Page:
    """A slice of a query, and the query that counts all of it."""

    rows: sa.Select[Any]
    total: sa.Select[int]


def checked_limit(limit: int) -> int:
    """`limit` itself. Layers above cap what clients ask for, so more than a page is a bug of ours."""
    assert 0 <= limit <= MAX_PAGE_ROWS, limit
    return limit


def checked_page(query: sa.Select[Any], *, limit: int, offset: int) -> Page:
    """The page of `query`, which must have a total order."""
    assert offset >= 0, offset
    total = sa.select(sa.func.count()).select_from(query.order_by(None).subquery())
    return Page(rows=query.limit(checked_limit(limit)).offset(offset), total=total)


def read_page(conn: sa.Connection, page: Page) -> tuple[Sequence[AnyRow], int]:
    """Rows and total; the total may already count a row that came in between."""
    return conn.execute(page.rows).all(), conn.execute(page.total).scalar_one()
