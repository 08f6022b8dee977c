"""Where tenants live, under any order of workers that come, go and die: the rules of the placement itself."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from treadle.domain.ids import TenantId
from treadle.scheduler import placement
from treadle.scheduler.placement import FORGET_AFTER_S, GATHER_S, MIN_GAP, UNEVEN_FOR_S, Placement, least_loaded

SLOTS = range(4)
TENANTS = [TenantId(f"tenant-{index}") for index in range(9)]


def opened(num: int) -> Placement:
    found = Placement()
    for slot in range(num):
        found.open(slot, 0.0)
        found.up(slot, 0.0)
    return found


def test_newcomers_spread_and_stay() -> None:
    found = opened(3)
    found.look(TENANTS, 1.0)
    assert sorted(len(found.tenants_of(slot)) for slot in range(3)) == [3, 3, 3]
    before = {tenant: found.home(tenant) for tenant in TENANTS}
    for second in range(2, 200):
        found.look(TENANTS, float(second))
    assert {tenant: found.home(tenant) for tenant in TENANTS} == before
    assert found.num_told == 0


def test_loads_that_differ_for_a_while_are_evened_out_and_then_nobody_moves() -> None:
    found = opened(2)
    found.look(TENANTS[:8], 0.0)
    stay = [tenant for tenant in TENANTS[:8] if found.home(tenant) == 0]
    now = 0.0
    moved_at: list[float] = []
    for _ in range(600):
        now += 1.0
        found.look(stay, now)
        for tenant in found.moving_from(0):
            found.released(tenant, now)
            moved_at.append(now)
    assert moved_at, "four on one worker and nobody on the other"
    assert min(moved_at) > UNEVEN_FOR_S
    loads = found.loads(now)
    assert abs(loads[0] - loads[1]) < MIN_GAP
    assert len(moved_at) <= 3, "who has moved stays"


def test_a_worker_that_comes_up_gets_its_part_at_once() -> None:
    found = opened(1)
    found.look(TENANTS[:8], 5.0)
    found.open(1, 6.0)
    found.up(1, 7.0)
    assert len(found.moving_from(0)) == 4
    for tenant in found.moving_from(0):
        found.released(tenant, 7.0)
    assert len(found.tenants_of(1)) == 4


def test_a_worker_that_was_away_for_long_gets_its_part_again_and_one_that_was_not_keeps_it() -> None:
    found = opened(2)
    found.look(TENANTS[:8], 0.0)
    found.down(1, 1.0)
    found.look(TENANTS[:8], 2.0)
    found.up(1, 3.0)
    assert (len(found.tenants_of(1)), found.num_told) == (4, 0)
    found.down(1, 4.0)
    found.look(TENANTS[:8], 5.0 + placement.AWAY_S)
    assert found.tenants_of(1) == []
    found.up(1, 6.0 + placement.AWAY_S)
    assert len(found.moving_from(0)) == 4


def test_the_first_worker_waits_for_the_others_of_its_lead_for_a_moment() -> None:
    found = Placement()
    for slot in range(2):
        found.open(slot, 0.0)
    found.up(0, 1.0)
    found.look(TENANTS, 1.5)
    assert found.home(TENANTS[0]) is None
    found.look(TENANTS, 1.0 + GATHER_S)
    assert {found.home(tenant) for tenant in TENANTS} == {0}


def test_whoever_moved_is_not_read_as_it_was_before() -> None:
    found = opened(2)
    found.look(TENANTS[:1], 1.0)
    [tenant] = TENANTS[:1]
    home = found.home(tenant)
    assert home is not None
    version = found.version
    assert found.was_home(tenant, home, version)
    found.leave(home, 2.0)
    found.released(tenant, 2.0)
    other = 1 - home
    assert found.home(tenant) == other
    assert not found.was_home(tenant, other, version), "a reading that began before the move"
    assert found.was_home(tenant, other, found.version)


def test_the_least_loaded_is_chosen_by_load_then_by_what_waits() -> None:
    assert least_loaded({0: 2.0, 1: 1.0, 2: 1.0}, {1: 9, 2: 5}) == 2


class World(RuleBasedStateMachine):
    """Any order of events. `held`: which worker may hold something of a tenant, by the protocol alone."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement()
        self.now = 0.0
        self.open: dict[int, bool] = {}
        self.leaving: set[int] = set()
        self.held: dict[TenantId, int] = {}

    def note_homes(self) -> None:
        """A worker that is up may take hold of its tenants at any time."""
        for tenant in TENANTS:
            home = self.placement.home(tenant)
            if home is not None and self.open.get(home):
                assert self.held.get(tenant, home) == home, "two workers may hold one tenant"
                self.held[tenant] = home

    def drop(self, slot: int) -> None:
        self.held = {tenant: at for tenant, at in self.held.items() if at != slot}

    @rule(slot=st.sampled_from(SLOTS))
    def opens(self, slot: int) -> None:
        if slot not in self.open:
            self.placement.open(slot, self.now)
            self.open[slot] = False

    @rule(slot=st.sampled_from(SLOTS))
    def comes_up(self, slot: int) -> None:
        if self.open.get(slot) is False and slot not in self.leaving:
            self.placement.up(slot, self.now)
            self.open[slot] = True

    @rule(slot=st.sampled_from(SLOTS))
    def dies(self, slot: int) -> None:
        if self.open.get(slot):
            self.drop(slot)
            self.open[slot] = False
            self.placement.down(slot, self.now)

    @rule(slot=st.sampled_from(SLOTS))
    def leaves(self, slot: int) -> None:
        if slot in self.open:
            self.placement.leave(slot, self.now)
            self.leaving.add(slot)

    @rule(slot=st.sampled_from(SLOTS))
    def closes(self, slot: int) -> None:
        if slot in self.leaving and not self.placement.moving_from(slot):
            self.drop(slot)
            del self.open[slot]
            self.leaving.discard(slot)
            self.placement.close(slot, self.now)

    @rule(who=st.sets(st.sampled_from(TENANTS)), seconds=st.floats(0.0, 40.0))
    def looks(self, who: set[TenantId], seconds: float) -> None:
        self.now += seconds
        self.placement.look(who, self.now)

    @precondition(lambda self: any(self.placement.moving_from(slot) for slot in SLOTS))
    @rule(data=st.data())
    def lets_go(self, data: st.DataObject) -> None:
        moving = [tenant for slot in SLOTS if self.open.get(slot) for tenant in self.placement.moving_from(slot)]
        if moving:
            tenant = data.draw(st.sampled_from(moving))
            self.held.pop(tenant, None)
            self.placement.released(tenant, self.now)

    @invariant()
    def one_holds_a_tenant(self) -> None:
        self.note_homes()

    @invariant()
    def homes_exist(self) -> None:
        for tenant in TENANTS:
            home = self.placement.home(tenant)
            assert home is None or home in self.open

    @invariant()
    def nobody_is_kept_waiting(self) -> None:
        """Whoever was seen has a home while a worker is up and stays, but for the first moments of a lead."""
        if not self.placement.loads(self.now) or self.placement._is_gathering(self.now):
            return
        self.placement.look(self.placement._seen, self.now)
        for tenant in self.placement._seen:
            assert self.placement.home(tenant) is not None


World.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWorld = pytest.mark.timeout(120)(World.TestCase)


def test_ten_thousand_newcomers_cost_no_more_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is placed by the loads of all, which are summed up once."""
    found = opened(8)
    calls = 0
    loads = placement.Placement.loads

    def counted(self: Placement, now: float) -> dict[int, float]:
        nonlocal calls
        calls += 1
        return loads(self, now)

    monkeypatch.setattr(placement.Placement, "loads", counted)
    found.look([TenantId(str(index)) for index in range(10_000)], 1.0)
    assert calls < 10
    assert {len(found.tenants_of(slot)) for slot in range(8)} == {1_250}


def test_who_was_away_for_long_and_of_whom_nobody_knows_a_run_is_forgotten() -> None:
    """Else a pool would keep everybody who ever came."""
    found = opened(2)
    found.look(TENANTS, 0.0)
    version = found.version
    [known, gone, *_] = found.tenants_of(0)
    there = found.tenants_of(1)
    found.look([TENANTS[-1]], FORGET_AFTER_S)
    assert found.forget(0, {known, TENANTS[-1]}, FORGET_AFTER_S) > 0
    assert set(found.tenants_of(0)) <= {known, TENANTS[-1]}
    assert found.tenants_of(1) == there, "those are another worker's to forget"
    # A reading that began before knows nothing of what another worker did of it in between.
    found.look([gone], FORGET_AFTER_S)
    home = found.home(gone)
    assert home is not None
    assert not found.was_home(gone, home, version)
    assert found.was_home(gone, home, found.version)


def test_whoever_moves_is_not_forgotten_on_the_way() -> None:
    found = opened(2)
    found.look(TENANTS, 0.0)
    found.leave(0, 0.0)
    moving = found.moving_from(0)
    assert moving
    found.forget(0, (), 10 * FORGET_AFTER_S)
    assert found.moving_from(0) == moving


def test_the_end_of_a_worker_with_many_tenants_is_no_square_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten thousand of them the process would stand still for longer than its lease lasts."""
    real, num_sums = Placement.loads, 0

    def loads(found: Placement, now: float) -> dict[int, float]:
        nonlocal num_sums
        num_sums += 1
        return real(found, now)

    monkeypatch.setattr(Placement, "loads", loads)
    crowd = [TenantId(f"tenant-{index}") for index in range(300)]
    for leaves in (False, True):
        found = opened(3)
        found.look(crowd, 1.0)
        num_sums = 0
        if leaves:
            found.leave(0, 1.0)
            assert len(found.moving_from(0)) == 100
        found.down(0, 1.0)
        found.close(0, 1.0)
        assert num_sums < 10
        assert [len(found.tenants_of(slot)) for slot in (1, 2)] == [150, 150]
        assert [round(load) for load in real(found, 1.0).values()] == [150, 150]
