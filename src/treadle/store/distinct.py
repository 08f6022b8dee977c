"""Distinct values of an indexed column, in order: from one entry of the index to the first one behind its value.

It refuses to know tables. Invariant: a value with a million rows costs what one with a single row does.
"""

from __future__ import annotations

import sqlalchemy as sa


def distinct_values(column: sa.Column[str], where: sa.ColumnElement[bool], *, limit: int) -> sa.CTE:
    """The first `limit` values of `column` for which `where` holds; it must hold of all behind the first one, too.

    A CTE with the column `value`, whose last row may be NULL.
    """
    first = sa.select(sa.func.min(column).label("value"), sa.literal(1).label("place")).where(where)
    steps = first.cte("steps", recursive=True)
    following = sa.select(sa.func.min(column)).where(column > steps.c.value).correlate(steps).scalar_subquery()
    more = sa.select(following, steps.c.place + 1).where(steps.c.value.is_not(None))
    return steps.union_all(more.where(steps.c.place < limit))
