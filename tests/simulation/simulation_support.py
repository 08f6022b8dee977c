"""Scenarios drawn from a seed: few clients, all habits, small budgets, and something dying all the time."""

from __future__ import annotations

import random

from treadle.testing.simulation.clients import Habit
from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.draws import Gaps, Lengths
from treadle.testing.simulation.loop import Clock
from treadle.testing.simulation.scenario import Faults, Group, Scenario

# Near what the 1M model costs on a CPU; the figures of the tests do not depend on the machine.
COSTS = Costs(
    forward_s=0.012,
    token_s=1 / 9_500,
    op_s=0.0005,
    outside_s=0.006,
    client_s=0.01,
    client_cv=0.3,
    submit_s=0.004,
    submit_cv=1.0,
    restore_s=0.003,
    snapshot_s=0.002,
    write_s=0.01,
    respawn_s=1.0,
    takeover_s=2.0,
)


def random_habit(rng: random.Random) -> Habit:
    is_open = rng.random() < 0.2
    is_paired = is_open or rng.random() < 0.6
    return Habit(
        Lengths(rng.uniform(2, 7), rng.uniform(0, 0.7), 4_096),
        datums=rng.choice((1, 1, 3, 20)),
        passes_per_step=rng.choice((1, 1, 2, 5)),
        is_paired=is_paired,
        depth=rng.choice((1, 1, 2, 6)) if is_paired and not is_open else 1,
        publishes=rng.random() < 0.3,
        pause=Gaps(rng.uniform(0.01, 2), rng.choice((0.0, 1.0, 3.0))) if not is_open and rng.random() < 0.4 else None,
        arrivals=Gaps(rng.uniform(0.5, 3), rng.choice((1.0, 4.0))) if is_open else None,
    )


def random_scenario(seed: int, *, duration_s: float) -> Scenario:
    """Everything that may differ between two services differs between two seeds."""
    rng = random.Random(f"scenario {seed}")
    groups = tuple(
        Group(f"g{index}", rng.randint(1, 4), random_habit(rng), rng.choice((0.25, 1.0, 1.0, 4.0)), rng.randint(1, 2))
        for index in range(rng.randint(1, 4))
    )
    num_workers = rng.randint(1, 3)
    return Scenario(
        f"seed {seed}",
        groups,
        duration_s=duration_s,
        warmup_s=0.0,
        num_workers=num_workers,
        clock=Clock(
            gather_window_s=rng.choice((0.0, 0.02)),
            target_cycle_s=rng.choice((0.1, 0.5)),
            budget_tokens=rng.choice((0, 0, 300, 2_048, 16_384)),
            cap_fraction=rng.choice((0.1, 0.5, 1.0)),
            has_snapshots=rng.random() < 0.8,
            max_replay_s=rng.choice((0.1, 2.0)),
            suspect_after=rng.choice((1, 2)),
        ),
        faults=Faults(
            worker_gap_s=rng.choice((0.0, 1.5, 5.0)),
            leader_gap_s=rng.choice((0.0, 6.0)),
            lost_at_s=duration_s / 2,
            lost_workers=rng.randrange(num_workers),
        ),
    )
