"""What is simulated: who works how, on how many workers, and what dies when. Data, and the scenarios by name.

Invariant: a scenario and a seed say everything but the costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from treadle.domain.fairness import DEFAULT_WEIGHTS
from treadle.testing.simulation.clients import Habit
from treadle.testing.simulation.draws import LENGTH_MIXES, Gaps, Lengths
from treadle.testing.simulation.loop import Clock


@dataclass(frozen=True, slots=True)
class Group:
    """Tenants that work alike. Each has `runs` runs, one client for each."""

    name: str
    tenants: int
    habit: Habit
    weight: float = 1.0
    runs: int = 1


@dataclass(frozen=True, slots=True)
class Faults:
    """worker_gap_s, leader_gap_s: mean seconds between deaths of some worker, of the leader; 0 is never.

    lost_at_s, lost_workers: the moment when that many workers go for good, as with a rack; none when 0.
    """

    worker_gap_s: float = 0.0
    leader_gap_s: float = 0.0
    lost_at_s: float = 0.0
    lost_workers: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """warmup_s of the duration_s count for nothing. starts_over_s: clients begin at even gaps over this time."""

    name: str
    groups: tuple[Group, ...]
    duration_s: float = 120.0
    warmup_s: float = 20.0
    starts_over_s: float = 1.0
    num_workers: int = 1
    clock: Clock = field(default_factory=Clock)
    faults: Faults = field(default_factory=Faults)


_SMALL = Habit(Lengths.always(128), datums=4)
_FLOODER = Habit(LENGTH_MIXES["medium"], datums=64, depth=8, passes_per_step=4)


def _service(tenants: int, *, workers: int, **more: Any) -> Scenario:
    """A service's tenants, some 120 tokens/s each: synchronous, paired and pipelined ones, and RL clients that sample
    for a minute between their steps."""
    small, pause = Lengths.always(128), Gaps(5.0, 1.0)
    groups = (
        Group("synchronous", tenants // 4, Habit(small, datums=4, is_paired=False, pause=pause)),
        Group("paired", tenants // 4, Habit(small, datums=4, pause=pause)),
        Group("pipelined", tenants // 6, Habit(small, datums=4, depth=2, pause=pause)),
        Group("rl", tenants // 3, Habit(LENGTH_MIXES["short"], datums=16, publishes=True, pause=Gaps(60.0, 1.0))),
    )
    return Scenario(f"service-{tenants}", groups, num_workers=workers, starts_over_s=10.0, **more)


def _bursty(cv: float) -> Scenario:
    habit = Habit(Lengths.always(128), datums=4, arrivals=Gaps(2.0, cv))
    return Scenario(f"bursty-{cv:g}", (Group("open", 16, habit),))


def _mix(name: str) -> Scenario:
    habit = Habit(LENGTH_MIXES[name], datums=8, depth=2)
    return Scenario(f"mix-{name}", (Group("pipelined", 16, habit),))


_NAMED: Final[Mapping[str, Callable[[], Scenario]]] = {
    "one": lambda: Scenario("one", (Group("paired", 1, _SMALL),)),
    "eight": lambda: Scenario("eight", (Group("paired", 8, _SMALL),)),
    "small-16": lambda: Scenario("small-16", (Group("small", 16, _SMALL),)),
    "flooder": lambda: Scenario("flooder", (Group("small", 15, _SMALL), Group("flooder", 1, _FLOODER))),
    "backlogged": lambda: Scenario(
        "backlogged",
        (Group("small", 15, replace(_SMALL, depth=4)), Group("flooder", 1, _FLOODER)),
    ),
    "weights": lambda: Scenario(
        "weights",
        tuple(Group(name, 5, replace(_FLOODER, datums=16), weight=weight) for name, weight in DEFAULT_WEIGHTS.items()),
    ),
    **{f"mix-{name}": partial(_mix, name) for name in LENGTH_MIXES},
    **{f"bursty-{cv}": partial(_bursty, cv) for cv in (1, 2, 4, 8)},
    "service-40": lambda: _service(40, workers=1),
    "service-400": lambda: _service(400, workers=8),
    "service-1000": lambda: _service(1_000, workers=20),
    "service-10000": lambda: _service(10_000, workers=200, duration_s=40.0),
    "overload-10000": lambda: Scenario(
        "overload-10000", (Group("paired", 10_000, _SMALL),), num_workers=4, duration_s=180.0, starts_over_s=10.0
    ),
    "deaths-8": lambda: Scenario(
        "deaths-8", (Group("paired", 8, _SMALL),), duration_s=320.0, faults=Faults(worker_gap_s=20.0)
    ),
    "worker-deaths": lambda: _service(400, workers=8, duration_s=140.0, faults=Faults(worker_gap_s=10.0)),
    "leader-deaths": lambda: _service(400, workers=8, duration_s=140.0, faults=Faults(leader_gap_s=30.0)),
    "rack-loss": lambda: _service(1_000, workers=24, faults=Faults(lost_at_s=60.0, lost_workers=4)),
}
SCENARIOS: Final[tuple[str, ...]] = tuple(_NAMED)


def scenario(name: str) -> Scenario:
    """The scenario of SCENARIOS with this name."""
    return _NAMED[name]()
