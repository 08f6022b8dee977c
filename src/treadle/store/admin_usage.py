"""Usage of all tenants for operators: sums over any hours that are kept, and what the SDK's admin client asks for.

It refuses to know prices and to change a row. Invariants: every amount is in exactly one row of each grouping, so sums
by tenant, run, session, project, day and hour agree; an hour's sum over all tenants is remembered only once nothing can
add to it any more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa

from treadle.domain.ids import SessionId, TenantId
from treadle.domain.limits import MAX_ADMIN_USAGE_ROWS
from treadle.domain.usage import HOUR_S, StorageRecord, UsageKind, UsageRecord, hour_of
from treadle.store.distinct import distinct_values
from treadle.store.engine import Database
from treadle.store.pages import checked_limit
from treadle.store.sessions import session_project
from treadle.store.tables import AnyRow, checkpoints, models, sessions, usage_events

GroupBy: TypeAlias = Literal["tenant", "run", "session", "project", "day", "hour"]
"""One row per tenant; per tenant and run, session or project; or per day or hour of UTC over all tenants."""

_DAY_S = 24 * HOUR_S
_HOURS_PER_DAY = 24
# A commit counts its work for the hour in which it began, and is tried again for a minute when the database is away.
_SETTLED_AFTER_S = 900
_u = usage_events.c
_SUMS = tuple(
    sa.func.sum(sa.case((_u.kind == sa.literal_column(f"'{kind.value}'"), _u.amount), else_=sa.literal_column("0.0")))
    for kind in UsageKind
)
_ENDS = (sa.select(sa.func.min(_u.bucket_start)), sa.select(sa.func.max(_u.bucket_start)))
_KEYS: Mapping[str, tuple[sa.ColumnElement[Any], ...]] = {
    "tenant": (_u.tenant_id,),
    "run": (_u.tenant_id, _u.model_id),
    "session": (_u.tenant_id, _u.session_id),
    "project": (_u.tenant_id, session_project),
    "hour": (_u.bucket_start,),
}


@dataclass(frozen=True, slots=True)
class SumQuery:
    """What to add up: hours that begin in [since, before), epoch seconds, of one tenant when it is given.

    behind: the key of the last row of the page before, as `UsageSum.key` has it.
    """

    group_by: GroupBy
    since: int
    before: int
    limit: int
    tenant_id: TenantId | None = None
    behind: tuple[str | int, ...] | None = None


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What one group used: tokens, named saves and byte-seconds. key: one or two values that say which group."""

    key: tuple[str | int, ...]
    amounts: Mapping[UsageKind, float]


class AdminUsage:
    """See the module."""

    def __init__(
        self, *, database: Database, clock: Callable[[], float], first_hour_to_accrue: Callable[[], Awaitable[int]]
    ) -> None:
        """first_hour_to_accrue: the first hour whose storage may not be written yet (Usage has it)."""
        self._database = database
        self._clock = clock
        self._first_hour_to_accrue = first_hour_to_accrue
        # Sums over all tenants of hours that are settled; None for those in which nothing was used.
        self._settled: dict[int, UsageSum | None] = {}

    async def sums(self, query: SumQuery) -> list[UsageSum]:
        """The next `query.limit` groups that used something, by their keys."""
        checked_limit(query.limit)
        if query.group_by not in ("day", "hour"):
            return await self._database.read(lambda conn: _by_tenant(conn, query))
        first = _first_hour(query)
        if query.tenant_id is None:
            hours = await self._hours_of_all(first, query.before)
        else:
            # One more day than is asked for, so that the last one is whole.
            hours = await self._read(_statement(replace(query, since=first), "hour", _most_hours(query)))
        return (hours if query.group_by == "hour" else list(_by_day(hours)))[: query.limit]

    async def _hours_of_all(self, since: int, before: int) -> list[UsageSum]:
        """The hours in [since, before) in which any tenant used something, by time."""
        # Asked for before the sums are read: what is settled now was so then.
        settled_before = min(await self._first_hour_to_accrue(), hour_of(self._clock() - _SETTLED_AFTER_S))
        oldest, newest = await self._database.read(lambda conn: [conn.execute(one).scalar_one() for one in _ENDS])
        if oldest is None:
            return []
        for hour in [hour for hour in self._settled if hour < oldest]:
            del self._settled[hour]
        hours = range(max(since, oldest), min(before, newest + HOUR_S), HOUR_S)
        missing = [hour for hour in hours if hour not in self._settled]
        found: dict[int, UsageSum | None] = dict.fromkeys(missing)
        if missing:
            query = SumQuery("hour", missing[0], missing[-1] + HOUR_S, len(missing))
            found |= {int(one.key[0]): one for one in await self._read(_statement(query, "hour", None))}
        self._settled |= {hour: one for hour, one in found.items() if hour < settled_before}
        sums = (found[hour] if hour in found else self._settled[hour] for hour in hours)
        return [one for one in sums if one is not None]

    async def _read(self, statement: sa.Select[tuple[Any, ...]]) -> list[UsageSum]:
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [_sum_of(row) for row in rows]

    async def events(self, *, since: int, before: int) -> list[UsageRecord] | None:
        """All tenants' rows of the hours that begin in [since, before), by hour, then by tenant and amount. None when
        there are more than MAX_ADMIN_USAGE_ROWS."""
        statement = (
            sa.select(*_u)
            .where(_u.bucket_start >= since, _u.bucket_start < before)
            .order_by(_u.bucket_start, _u.tenant_id, _u.amount.desc(), _u.session_id, _u.model_id, _u.kind)
            .limit(MAX_ADMIN_USAGE_ROWS + 1)
        )
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return None if len(rows) > MAX_ADMIN_USAGE_ROWS else [_record_of(row) for row in rows]

    async def storage(self, project_id: str | None = None) -> list[StorageRecord] | None:
        """What every tenant's live checkpoints take now, by tenant and project; of one project when it is given. None
        when there are more than MAX_ADMIN_USAGE_ROWS."""
        c = checkpoints.c
        project = session_project.label("project")
        statement = (
            sa.select(c.tenant_id, project, sa.func.count(), sa.func.sum(c.size_bytes))
            .join_from(checkpoints, models)
            .join(sessions, sessions.c.session_id == models.c.session_id)
            .where(sa.or_(c.expires_at.is_(None), c.expires_at > self._clock()))
            .group_by(c.tenant_id, project)
            .order_by(c.tenant_id, project)
            .limit(MAX_ADMIN_USAGE_ROWS + 1)
        )
        if project_id is not None:
            statement = statement.where(session_project == project_id)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        if len(rows) > MAX_ADMIN_USAGE_ROWS:
            return None
        return [StorageRecord(TenantId(tenant_id), name, count, int(size)) for tenant_id, name, count, size in rows]


def _by_tenant(conn: sa.Connection, query: SumQuery) -> list[UsageSum]:
    """Groups of so many tenants at a time: each tenant's rows lie together, and those of a window do not."""
    if query.tenant_id is not None:
        return [_sum_of(row) for row in conn.execute(_statement(query, query.group_by, query.limit))]
    found: list[UsageSum] = []
    last: str | None = None
    while len(found) < query.limit:
        tenant_ids = _next_tenants(conn, query, last)
        if not tenant_ids:
            break
        last = tenant_ids[-1]
        statement = _statement(query, query.group_by, query.limit - len(found)).where(_u.tenant_id.in_(tenant_ids))
        found += [_sum_of(row) for row in conn.execute(statement)]
    return found


def _next_tenants(conn: sa.Connection, query: SumQuery, last: str | None) -> Sequence[str]:
    """The next tenants that ever used something."""
    if last is not None:
        where: sa.ColumnElement[bool] = _u.tenant_id > last
    else:
        # The last page's own tenant may have more groups.
        where = _u.tenant_id >= ("" if query.behind is None else query.behind[0])
    steps = distinct_values(_u.tenant_id, where, limit=query.limit)
    return (
        conn.execute(sa.select(steps.c.value).where(steps.c.value.is_not(None)).order_by(steps.c.value)).scalars().all()
    )


def _first_hour(query: SumQuery) -> int:
    """Of a page of days or hours."""
    if query.behind is None:
        return query.since
    step = _DAY_S if query.group_by == "day" else HOUR_S
    return max(query.since, int(query.behind[0]) + step)


def _most_hours(query: SumQuery) -> int:
    return query.limit if query.group_by == "hour" else (query.limit + 1) * _HOURS_PER_DAY


def _statement(query: SumQuery, group_by: str, limit: int | None) -> sa.Select[tuple[Any, ...]]:
    keys = _KEYS[group_by]
    statement = (
        sa.select(*keys, *_SUMS)
        .where(_u.bucket_start >= query.since, _u.bucket_start < query.before)
        .group_by(*keys)
        .order_by(*keys)
        .limit(limit)
    )
    if group_by == "project":
        statement = statement.outerjoin_from(usage_events, sessions, sessions.c.session_id == _u.session_id)
    if query.tenant_id is not None:
        statement = statement.where(_u.tenant_id == query.tenant_id)
    if query.behind is not None and group_by != "hour":
        statement = statement.where(_is_behind(keys, query.behind))
    return statement


def _is_behind(keys: Sequence[sa.ColumnElement[Any]], behind: tuple[str | int, ...]) -> sa.ColumnElement[bool]:
    if len(keys) == 1:
        return keys[0] > behind[0]
    first, second = keys
    # The first condition is what an index can follow.
    return sa.and_(first >= behind[0], sa.or_(first > behind[0], second > behind[1]))


def _by_day(hours: Sequence[UsageSum]) -> Iterator[UsageSum]:
    def day_of(hour: UsageSum) -> int:
        return int(hour.key[0]) // _DAY_S * _DAY_S

    for day, found in groupby(hours, key=day_of):
        parts = list(found)
        yield UsageSum((day,), {kind: sum(part.amounts[kind] for part in parts) for kind in UsageKind})


def _sum_of(row: AnyRow) -> UsageSum:
    num_keys = len(row) - len(UsageKind)
    return UsageSum(tuple(row[:num_keys]), dict(zip(UsageKind, row[num_keys:], strict=True)))


def _record_of(row: AnyRow) -> UsageRecord:
    return UsageRecord(
        tenant_id=TenantId(row.tenant_id),
        bucket_start=row.bucket_start,
        session_id=SessionId(row.session_id),
        base_model=row.base_model,
        kind=UsageKind(row.kind),
        amount=row.amount,
        model_id=row.model_id,
    )
