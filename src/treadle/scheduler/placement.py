"""On which of a pool's workers a tenant's runs live, and when it moves. Pure: times come in, decisions are kept here.

Every worker holds the whole base model, so a tenant lives on one, and all its runs with it. A worker's load is the sum
of its tenants' presence: how much of the last half minute each had work in line. Whoever always has some counts one,
whatever it gets: that is what its neighbours feel. A newcomer goes where the load is least and stays. Tenants move when
the loads have been far apart for a while, when a worker has come up, and when theirs leaves or stays away.
It refuses to know how a run is moved. Invariants: a tenant has one home at a time, which changes only when its worker
says that it holds nothing of it any more (`released`) or is not there (`is_up` False); no move makes loads more uneven.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from treadle.domain.ids import TenantId

# Presence forgets with this time constant.
MEMORY_S = 30.0
# Loads that differ by less than this many tenants are even: a move must be worth its restore.
MIN_GAP = 1.25
# What a move must take away of the difference.
MIN_GAIN = 0.5
# How long loads are uneven before somebody moves, and how long who has moved stays.
UNEVEN_FOR_S = 10.0
STAY_S = 60.0
# A worker that is away for longer than this loses its tenants.
AWAY_S = 30.0
# When a lead begins, the first worker that is up waits so long for the others before it takes everybody.
GATHER_S = 3.0
# How often it is looked at whether somebody should move.
WATCH_EVERY_S = 0.5
# Tenants that one decision moves.
MAX_MOVES_AT_ONCE = 64
# Who had no work for so long, and of whom no worker knows a run, comes back as a newcomer.
FORGET_AFTER_S = 600.0


def least_loaded(loads: Mapping[int, float], queued_tokens: Mapping[int, int] = MappingProxyType({})) -> int:
    """The worker, out of the keys, with the least load, then with the least waiting, then the first.

    Not the other way round: a queue is empty for a moment on every worker, and whoever came in that moment would all
    go there (in simulations of 1,000 tenants on 8 workers, half of them on one).
    """
    assert loads, "no worker is left"
    return min(loads, key=lambda index: (loads[index], queued_tokens.get(index, 0), index))


@dataclass(slots=True)
class _Tenant:
    """home: None while no worker is up. target: where it is moving to. presence: at `seen_at`, its last work."""

    home: int | None
    presence: float
    seen_at: float
    target: int | None = None
    settled_at: float = -math.inf

    def presence_at(self, now: float) -> float:
        return self.presence * math.exp(-max(0.0, now - self.seen_at) / MEMORY_S)

    def see(self, now: float, *, was_present: bool) -> None:
        faded = self.presence_at(now)
        # Whoever was there at the last look as well was there in between.
        gained = 1.0 - math.exp(-max(0.0, now - self.seen_at) / MEMORY_S) if was_present else 0.0
        self.presence, self.seen_at = min(1.0, faded + gained), now


@dataclass(slots=True)
class _Slot:
    """away_since: when it was last up, or was opened. is_first: it was opened before any was up."""

    away_since: float
    is_first: bool
    is_up: bool = False
    was_up: bool = False
    is_leaving: bool = False


@dataclass(slots=True)
class Placement:
    """The homes of a pool's tenants. Workers are numbers. `now`: seconds of any clock that never goes back."""

    _slots: dict[int, _Slot] = field(default_factory=dict)
    _tenants: dict[TenantId, _Tenant] = field(default_factory=dict)
    _seen: frozenset[TenantId] = frozenset()
    _first_up_at: float | None = None
    _uneven_since: float | None = None
    _watched_at: float = -math.inf
    # Grows with every change of a home; see `was_home`.
    version: int = 0
    _changed: dict[TenantId, int] = field(default_factory=dict)
    # When somebody was last forgotten: who is new since then may have had another home before.
    _forgot_at_version: int = 0
    # How many were ever told to move.
    num_told: int = 0

    # Workers.

    def open(self, slot: int, now: float) -> None:
        """A worker is wanted. Idempotent; one that was leaving stays."""
        known = self._slots.get(slot)
        if known is None:
            self._slots[slot] = _Slot(away_since=now, is_first=self._first_up_at is None)
        else:
            known.is_leaving = False
            self._keep(slot)

    def up(self, slot: int, now: float) -> None:
        """It has loaded and holds nothing. One where nobody lives gets its part of the others' tenants."""
        known = self._slots[slot]
        is_new = not self.tenants_of(slot)
        known.is_up = known.was_up = True
        if self._first_up_at is None:
            self._first_up_at = now
        if is_new:
            self._even_out(now, max_moves=MAX_MOVES_AT_ONCE, stay_s=0.0)

    def down(self, slot: int, now: float) -> None:
        """It is gone, with everything that it held. Whoever was moving away from it has moved."""
        known = self._slots[slot]
        known.is_up, known.away_since = False, now
        loads = self.loads(now)
        for tenant_id in self.moving_from(slot):
            self._settle(tenant_id, self._tenants[tenant_id], now, loads)

    def leave(self, slot: int, now: float) -> None:
        """It is not wanted any more: its tenants move, as soon as another is up."""
        known = self._slots[slot]
        if not known.is_leaving:
            known.is_leaving = True
            self._send_away(slot, now)

    def close(self, slot: int, now: float) -> None:
        """It has ended. Whoever was left there gets another home."""
        self._slots.pop(slot, None)
        loads = self.loads(now)
        for tenant_id in self.tenants_of(slot):
            self._settle(tenant_id, self._tenants[tenant_id], now, loads)

    # Tenants.

    def look(self, waiting: Collection[TenantId], now: float) -> None:
        """These have work in line now. Newcomers get a home, and tenants are told to move when it is time."""
        for tenant_id in waiting:
            tenant = self._tenants.get(tenant_id)
            if tenant is None:
                tenant = self._tenants[tenant_id] = _Tenant(home=None, presence=1.0, seen_at=now)
            else:
                tenant.see(now, was_present=tenant_id in self._seen)
        self._seen = frozenset(waiting)
        if now >= self._watched_at + WATCH_EVERY_S and len(self._slots) > 1:
            self._watched_at = now
            self._save_stranded(now)
            self._watch(now)
        homeless = [tenant_id for tenant_id in waiting if self._tenants[tenant_id].home is None]
        if homeless and not self._is_gathering(now) and (loads := self.loads(now)):
            for tenant_id in sorted(homeless):
                self._settle(tenant_id, self._tenants[tenant_id], now, loads)

    def home(self, tenant_id: TenantId) -> int | None:
        """The worker that may hold its runs; None when none does."""
        tenant = self._tenants.get(tenant_id)
        return None if tenant is None else tenant.home

    def was_home(self, tenant_id: TenantId, slot: int, version: int) -> bool:
        """Whether this is its home, and has been since `version` at least."""
        return self.home(tenant_id) == slot and self._changed.get(tenant_id, self._forgot_at_version) <= version

    def moving_from(self, slot: int) -> list[TenantId]:
        """Tenants that the worker should let go of."""
        return [id_ for id_, tenant in self._tenants.items() if tenant.home == slot and tenant.target is not None]

    def first(self) -> int | None:
        """The first worker that is up; None when none is."""
        return min((index for index, slot in self._slots.items() if slot.is_up), default=None)

    def tenants_of(self, slot: int) -> list[TenantId]:
        """Everybody whose home it is."""
        return [tenant_id for tenant_id, tenant in self._tenants.items() if tenant.home == slot]

    def released(self, tenant_id: TenantId, now: float) -> None:
        """Its worker holds nothing of it any more: its new home is where it was going, if that is still up."""
        tenant = self._tenants[tenant_id]
        assert tenant.target is not None, f"{tenant_id} was let go and stays"
        self._settle(tenant_id, tenant, now, self.loads(now))

    def forget(self, slot: int, known: Collection[TenantId], now: float) -> int:
        """Let go of who had no work for long and lives there, or nowhere; how many. known: of whom the worker has runs.

        To be called when it has nothing else in hand.
        """
        gone = [
            tenant_id
            for tenant_id, tenant in self._tenants.items()
            if tenant.home in (slot, None)
            and tenant.target is None
            and now >= tenant.seen_at + FORGET_AFTER_S
            and tenant_id not in known
            and tenant_id not in self._seen
        ]
        for tenant_id in gone:
            del self._tenants[tenant_id]
            self._changed.pop(tenant_id, None)
        if gone:
            self.version += 1
            self._forgot_at_version = self.version
        return len(gone)

    def loads(self, now: float) -> dict[int, float]:
        """Of workers that are up and stay, with everybody where they are going."""
        loads = {index: 0.0 for index, slot in self._slots.items() if slot.is_up and not slot.is_leaving}
        for tenant in self._tenants.values():
            index = tenant.home if tenant.target is None else tenant.target
            if index in loads:
                loads[index] += tenant.presence_at(now)
        return loads

    # How.

    def _is_gathering(self, now: float) -> bool:
        if self._first_up_at is None or now >= self._first_up_at + GATHER_S:
            return False
        return any(slot.is_first and not slot.was_up for slot in self._slots.values())

    def _settle(self, tenant_id: TenantId, tenant: _Tenant, now: float, loads: dict[int, float]) -> None:
        """Give it the home that it was going to, or the one with the least load; None when nobody is up.

        loads: as they are now; they are kept so.
        """
        before, wanted = tenant.home, tenant.target
        counted_at, presence = before if wanted is None else wanted, tenant.presence_at(now)
        if counted_at in loads:
            loads[counted_at] -= presence
        tenant.home = tenant.target = None
        if loads:
            tenant.home = wanted if wanted in loads else least_loaded(loads)
            loads[tenant.home] += presence
        if before is not None:
            tenant.settled_at = now
            self.version += 1
            self._changed[tenant_id] = self.version

    def _send_away(self, slot: int, now: float) -> None:
        loads = self.loads(now)
        for tenant in self._tenants.values():
            if loads and tenant.home == slot and tenant.target is None:
                tenant.target = least_loaded(loads)
                loads[tenant.target] += tenant.presence_at(now)
                self.num_told += 1

    def _keep(self, slot: int) -> None:
        for tenant in self._tenants.values():
            if tenant.home == slot:
                tenant.target = None

    def _save_stranded(self, now: float) -> None:
        """Those whose worker leaves, and could go nowhere before; those whose worker is not coming back."""
        for index, slot in self._slots.items():
            if slot.is_leaving:
                self._send_away(index, now)
            if slot.is_up or (now < slot.away_since + AWAY_S and not slot.is_leaving) or not (loads := self.loads(now)):
                continue
            for tenant_id in self.tenants_of(index):
                self._settle(tenant_id, self._tenants[tenant_id], now, loads)

    def _watch(self, now: float) -> None:
        """Move one tenant when loads have been uneven for long."""
        if self._best_move(now, stay_s=STAY_S) is None:
            self._uneven_since = None
        elif self._uneven_since is None:
            self._uneven_since = now
        elif now >= self._uneven_since + UNEVEN_FOR_S:
            self._even_out(now, max_moves=1, stay_s=STAY_S)
            self._uneven_since = None

    def _even_out(self, now: float, *, max_moves: int, stay_s: float) -> None:
        for _ in range(max_moves):
            if (move := self._best_move(now, stay_s=stay_s)) is None:
                return
            tenant_id, target = move
            self._tenants[tenant_id].target = target
            self.num_told += 1

    def _best_move(self, now: float, *, stay_s: float) -> tuple[TenantId, int] | None:
        """The move that evens out most between the fullest worker and the emptiest; None when none is worth it."""
        loads = self.loads(now)
        if len(loads) < 2:
            return None
        fullest = max(loads, key=lambda index: (loads[index], -index))
        emptiest = least_loaded(loads)
        gap = loads[fullest] - loads[emptiest]
        if gap < MIN_GAP:
            return None
        best: TenantId | None = None
        best_left = gap - MIN_GAIN
        for tenant_id, tenant in self._movable(fullest, now, stay_s):
            left = abs(gap - 2 * tenant.presence_at(now))
            if left < best_left or (best is not None and left == best_left and tenant_id < best):
                best, best_left = tenant_id, left
        return None if best is None else (best, emptiest)

    def _movable(self, slot: int, now: float, stay_s: float) -> Iterable[tuple[TenantId, _Tenant]]:
        for tenant_id, tenant in self._tenants.items():
            if tenant.home == slot and tenant.target is None and now >= tenant.settled_at + stay_s:
                yield tenant_id, tenant
