"""Token rates: counted by the commits that make work final, and known to this process with hardly a query.

What the table says is read now and then, with what this process committed since counted on top. So asking is cheap,
what this process finished counts at once, and other servers' work is seen at the next reading. It refuses to know what
anybody does about a rate (domain/rates.py has the rules). Invariants: work is counted in the transaction that makes its
row final, once; what this process committed is never believed to be less than it is.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import TenantId
from treadle.domain.ops import OpKind
from treadle.domain.policy import Policies
from treadle.domain.rates import (
    PER_MINUTE,
    RATE_KEPT_S,
    SETTLED_S,
    Meter,
    RateKind,
    RateLimits,
    RateUse,
    Spent,
    day_of,
    is_rated,
    rate_limits,
    slot_of,
)
from treadle.domain.usage import UsageKind
from treadle.store.dialect import Dialect
from treadle.store.engine import Database
from treadle.store.request_rows import FinishedRow, chunks
from treadle.store.tables import AnyRow, rate_windows, usage_events
from treadle.store.writer import Writer

# How old a reading may be that others' work is judged by: of the last minutes, and of the day.
READ_EVERY_S = 0.5
READ_DAY_EVERY_S = 5.0
# Tenants that are remembered, times two kinds; with more, all are read again.
MAX_METERS = 20_000
# What one transaction deletes of old slots: those of so many seconds.
_FORGET_STEP_S = 300
_PASSES = frozenset({OpKind.FORWARD, OpKind.FORWARD_BACKWARD})
_USAGE_KIND = {RateKind.TRAINING: UsageKind.TRAINING, RateKind.SAMPLING: UsageKind.SAMPLED}

_w, _u = rate_windows.c, usage_events.c
_IDS: sa.BindParameter[str] = sa.bindparam("ids", expanding=True)
_SLOTS = sa.select(_w.tenant_id, _w.slot_start, _w.amount).where(
    _w.tenant_id.in_(_IDS), _w.kind == sa.bindparam("of_kind"), _w.slot_start >= sa.bindparam("since")
)
_DAYS = (
    sa.select(_u.tenant_id, sa.func.sum(_u.amount))
    .where(_u.tenant_id.in_(_IDS), _u.bucket_start >= sa.bindparam("since"), _u.kind == sa.bindparam("of_kind"))
    .group_by(_u.tenant_id)
)
_OLDEST = sa.select(sa.func.min(_w.slot_start))
_FORGET = rate_windows.delete().where(_w.slot_start < sa.bindparam("before"))


class RateCounter:
    """Counts inside a write transaction."""

    def __init__(self, dialect: Dialect) -> None:
        insert = dialect.insert(rate_windows)
        self._add = insert.on_conflict_do_update(
            index_elements=[_w.tenant_id, _w.kind, _w.slot_start], set_={"amount": _w.amount + insert.excluded.amount}
        )

    def count(
        self, conn: sa.Connection, finished: Sequence[FinishedRow], policies: Policies, now: float
    ) -> tuple[Spent, ...]:
        """Add what these rows, which became final in this transaction, took of rates: of those who have any."""
        rated = [kind for kind in RateKind if is_rated(policies, kind)]
        if not rated:
            return ()
        totals: Counter[tuple[TenantId, RateKind]] = Counter()
        for row in finished:
            if row.is_done and row.kind in _PASSES:
                totals[row.tenant_id, RateKind.TRAINING] += row.num_tokens
            elif row.outcome.usage is not None:
                # Also of a stream that its reader cut off.
                totals[row.tenant_id, RateKind.SAMPLING] += row.outcome.usage.num_sampled_tokens
        spent = tuple(
            Spent(tenant_id, kind, amount)
            for (tenant_id, kind), amount in sorted(totals.items())
            if amount and kind in rated and rate_limits(policies, tenant_id, kind).is_any
        )
        # Days are summed over usage_events. Sorted, so that two pools that count the same tenants cannot deadlock.
        rows = [
            {
                "tenant_id": one.tenant_id,
                "kind": one.kind.value,
                "slot_start": slot_of(now),
                "amount": float(one.amount),
            }
            for one in spent
            if policies.quota(one.tenant_id, PER_MINUTE[one.kind]) is not None
        ]
        if rows:
            conn.execute(self._add, rows)
        return spent


@dataclass(slots=True)
class _Entry:
    """One meter, and when it was read."""

    meter: Meter = field(default_factory=Meter)
    read_at: float = float("-inf")
    day_read_at: float = float("-inf")


class Rates:
    """See the module. On one event loop."""

    def __init__(self, *, database: Database, writer: Writer, clock: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._clock = clock
        self._entries: dict[tuple[TenantId, RateKind], _Entry] = {}
        self._reading = asyncio.Lock()
        # Committed while the table is read: perhaps in what is read, perhaps not. Counted twice rather than not at all.
        self._meanwhile: list[tuple[Spent, float]] = []

    def note(self, spent: Sequence[Spent], at: float) -> None:
        """This process committed this work. For the store's own modules."""
        for one in spent:
            if (entry := self._entries.get((one.tenant_id, one.kind))) is not None:
                entry.meter.add(one.amount, at)
            if self._reading.locked():
                self._meanwhile.append((one, at))

    async def uses(
        self, policies: Policies, kind: RateKind, tenant_ids: Collection[TenantId]
    ) -> dict[TenantId, tuple[RateUse, ...]]:
        """What each of these tenants that has a rate used of it, in tokens. No query when none has."""
        if not is_rated(policies, kind):
            return {}
        limits = {id_: limit for id_ in tenant_ids if (limit := rate_limits(policies, id_, kind)).is_any}
        if not limits:
            return {}
        async with self._reading:
            await self._refresh(kind, limits)
        now = self._clock()
        return {id_: self._entries[id_, kind].meter.uses(limit, kind, now) for id_, limit in limits.items()}

    async def forget(self) -> int:
        """Delete some minutes of what no rate looks back at: how many rows."""

        def write(conn: sa.Connection) -> int:
            oldest = conn.execute(_OLDEST).scalar_one()
            before = slot_of(self._clock() - RATE_KEPT_S)
            if oldest is None or oldest >= before:
                return 0
            return conn.execute(_FORGET, {"before": min(before, oldest + _FORGET_STEP_S)}).rowcount

        return await self._writer.run(write)

    async def _refresh(self, kind: RateKind, limits: dict[TenantId, RateLimits]) -> None:
        if len(self._entries) > MAX_METERS:
            self._entries.clear()
        now = self._clock()
        by_start: defaultdict[int, list[TenantId]] = defaultdict(list)
        days: list[TenantId] = []
        for tenant_id, limit in limits.items():
            entry = self._entries.setdefault((tenant_id, kind), _Entry())
            if limit.per_minute is not None and not 0 <= now - entry.read_at < READ_EVERY_S:
                by_start[slot_of(max(now - RATE_KEPT_S, entry.read_at - SETTLED_S))].append(tenant_id)
            is_today = entry.meter.day == day_of(now)
            if limit.per_day is not None and not (is_today and 0 <= now - entry.day_read_at < READ_DAY_EVERY_S):
                days.append(tenant_id)
        self._meanwhile.clear()
        try:
            for since, tenant_ids in by_start.items():
                await self._read_slots(kind, tenant_ids, since, now)
            if days:
                await self._read_days(kind, days, now)
        finally:
            self._meanwhile.clear()

    async def _read_slots(self, kind: RateKind, tenant_ids: list[TenantId], since: int, now: float) -> None:
        values = {"of_kind": kind.value, "since": since}
        found: defaultdict[TenantId, dict[int, float]] = defaultdict(dict)
        for tenant_id, slot, amount in await self._rows(_SLOTS, tenant_ids, values):
            found[TenantId(tenant_id)][slot] = amount
        for tenant_id in tenant_ids:
            entry = self._entries[tenant_id, kind]
            entry.meter.replace_since(since, found.get(tenant_id, {}))
            entry.read_at = now
            self._add_meanwhile(tenant_id, kind, entry.meter)

    async def _read_days(self, kind: RateKind, tenant_ids: list[TenantId], now: float) -> None:
        values = {"of_kind": _USAGE_KIND[kind].value, "since": day_of(now)}
        found = {tenant_id: float(used) for tenant_id, used in await self._rows(_DAYS, tenant_ids, values)}
        for tenant_id in tenant_ids:
            entry = self._entries[tenant_id, kind]
            entry.meter.set_day(day_of(now), found.get(tenant_id, 0.0))
            entry.day_read_at = now
            for one, at in self._meanwhile:
                if (one.tenant_id, one.kind) == (tenant_id, kind) and day_of(at) == entry.meter.day:
                    entry.meter.day_used += one.amount

    def _add_meanwhile(self, tenant_id: TenantId, kind: RateKind, meter: Meter) -> None:
        for one, at in self._meanwhile:
            if (one.tenant_id, one.kind) == (tenant_id, kind):
                slot = slot_of(at)
                meter.recent[slot] = meter.recent.get(slot, 0.0) + one.amount

    async def _rows(
        self, statement: sa.Select[Any], tenant_ids: list[TenantId], values: Mapping[str, object]
    ) -> list[AnyRow]:
        def read(conn: sa.Connection) -> list[AnyRow]:
            return [row for chunk in chunks(tenant_ids) for row in conn.execute(statement, {"ids": chunk, **values})]

        return await self._database.read(read)
