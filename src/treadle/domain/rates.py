"""Token rates: what a tenant used of its quotas per minute and per day, and when it may go on.

A minute's quota is a bucket that holds one minute's tokens and fills at the rate. Work may start while there is
anything in it, whatever its size, and takes out all that it costs; below zero the tenant waits. So a request larger
than the whole bucket runs, and is waited off. Over any T seconds at most `limit * (T / 60 + 1)` tokens run, and one
request more. It is a token bucket, kept as what is missing in it.
A day's quota is a sum over the UTC day. It refuses to know where numbers are kept.
Invariant: an amount counts from when it is known, at the latest from the end of its slot, never earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from treadle.domain.ids import TenantId
from treadle.domain.policy import Policies, Quota

# Tokens are summed over slots of so many seconds.
SLOT_S: Final = 5
# A debt is remembered for so long: sixty times the quota of a minute.
RATE_KEPT_S: Final = 3_600
# Slots that ended so long ago do not change any more.
SETTLED_S: Final = 15
MINUTE_S: Final = 60
DAY_S: Final = 24 * 3_600


class RateKind(StrEnum):
    """What is counted: tokens of passes, or tokens that were drawn."""

    TRAINING = "training"
    SAMPLING = "sampling"


PER_MINUTE: Final[Mapping[RateKind, Quota]] = {
    RateKind.TRAINING: Quota.TRAINED_PER_MINUTE,
    RateKind.SAMPLING: Quota.SAMPLED_PER_MINUTE,
}
PER_DAY: Final[Mapping[RateKind, Quota]] = {
    RateKind.TRAINING: Quota.TRAINED_PER_DAY,
    RateKind.SAMPLING: Quota.SAMPLED_PER_DAY,
}


@dataclass(frozen=True, slots=True)
class RateLimits:
    """A tenant's quotas of one kind; None: unlimited."""

    per_minute: int | None
    per_day: int | None

    @property
    def is_any(self) -> bool:
        return self.per_minute is not None or self.per_day is not None


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens of work that became final."""

    tenant_id: TenantId
    kind: RateKind
    amount: int


@dataclass(frozen=True, slots=True)
class RateUse:
    """One quota at one moment. used: tokens that count against it. opens_at: when there is room, in epoch seconds."""

    quota: Quota
    limit: int
    used: float
    opens_at: float

    @property
    def room(self) -> float:
        """Tokens that may start now; zero or less: none."""
        return self.limit - self.used


def rate_limits(policies: Policies, tenant_id: TenantId, kind: RateKind) -> RateLimits:
    """What operators set for a tenant."""
    return RateLimits(policies.quota(tenant_id, PER_MINUTE[kind]), policies.quota(tenant_id, PER_DAY[kind]))


def is_rated(policies: Policies, kind: RateKind) -> bool:
    """Whether any tenant can have such a quota."""
    return policies.limits_any(PER_MINUTE[kind], PER_DAY[kind])


def slot_of(seconds: float) -> int:
    """The first second of the slot that this time is in."""
    return int(seconds // SLOT_S) * SLOT_S


def day_of(seconds: float) -> int:
    """The first second of the UTC day that this time is in."""
    return int(seconds // DAY_S) * DAY_S


@dataclass(slots=True)
class Meter:
    """What one tenant used of one kind, as it is known here.

    recent: amounts by slot that may still change, or are not folded; settled: the others. day_used: since `day` began.
    """

    recent: dict[int, float] = field(default_factory=dict)
    settled: dict[int, float] = field(default_factory=dict)
    day: int = 0
    day_used: float = 0.0
    # The bucket after all settled slots, for one limit.
    _limit: int = 0
    _level: float = 0.0
    _at: float = 0.0

    def add(self, amount: float, now: float) -> None:
        """Work became final now."""
        slot = slot_of(now)
        self.recent[slot] = self.recent.get(slot, 0.0) + amount
        if self.day == day_of(now):
            self.day_used += amount

    def replace_since(self, since: int, amounts: Mapping[int, float]) -> None:
        """What the slots from `since` on hold; earlier ones stay."""
        for slot in [slot for slot in self.recent if slot >= since]:
            del self.recent[slot]
        self.recent.update((slot, amount) for slot, amount in amounts.items() if slot not in self.settled)

    def set_day(self, day: int, used: float) -> None:
        """What was used since the day began."""
        self.day, self.day_used = day, used

    def uses(self, limits: RateLimits, kind: RateKind, now: float) -> tuple[RateUse, ...]:
        """Each quota that is set."""
        uses = []
        if (limit := limits.per_minute) is not None:
            used = self._used_of_minute(limit, now)
            wait_s = max(0.0, used - limit) * MINUTE_S / limit
            uses.append(RateUse(PER_MINUTE[kind], limit, used, now + wait_s))
        if (limit := limits.per_day) is not None:
            used = self.day_used if self.day == day_of(now) else 0.0
            opens_at = now if used < limit else float(day_of(now) + DAY_S)
            uses.append(RateUse(PER_DAY[kind], limit, used, opens_at))
        return tuple(uses)

    def _used_of_minute(self, limit: int, now: float) -> float:
        """What is missing in the bucket."""
        assert limit > 0, "a rate is positive"
        self._settle(limit, now)
        level, at = self._level, self._at
        for slot, amount in sorted(self.recent.items()):
            level, at = _poured(level, at, amount, min(slot + SLOT_S, now), limit)
        return _poured(level, at, 0.0, now, limit)[0]

    def _settle(self, limit: int, now: float) -> None:
        """Fold what does not change any more, so that asking costs a few slots and not an hour of them."""
        over = sorted(slot for slot in self.recent if slot + SLOT_S <= now - SETTLED_S)
        fresh = {slot: self.recent.pop(slot) for slot in over}
        self.settled.update(fresh)
        if len(self.settled) > 2 * RATE_KEPT_S // SLOT_S:
            self.settled = {slot: amount for slot, amount in self.settled.items() if slot > now - RATE_KEPT_S}
        if limit != self._limit:
            self._limit, self._level, self._at = limit, 0.0, 0.0
            fresh = self.settled
        for slot in sorted(fresh):
            self._level, self._at = _poured(self._level, self._at, fresh[slot], slot + SLOT_S, limit)


def _poured(level: float, at: float, amount: float, now: float, limit: int) -> tuple[float, float]:
    """What is missing in the bucket after an amount at `now`, and that time; at `at`, `level` was missing."""
    refilled = max(0.0, now - at) * limit / MINUTE_S
    return max(0.0, level - refilled) + amount, max(at, now)
