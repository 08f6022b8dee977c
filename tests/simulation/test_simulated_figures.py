"""The figures that the simulator stands for, at fixed costs: what a change of the policy must not lose."""

from __future__ import annotations

import pytest
from simulation_support import COSTS

from treadle.testing.simulation.draws import LENGTH_MIXES
from treadle.testing.simulation.scenario import scenario
from treadle.testing.simulation.simulate import simulate


@pytest.mark.parametrize("name", ["backlogged", "mix-short", "mix-medium", "mix-long", "weights"])
def test_tokens_are_shared_by_weight(name: str) -> None:
    figures = simulate(scenario(name), COSTS, seed=1)
    assert figures["jain"] >= 0.98
    assert figures["busy"] > 0.9


def test_a_flooder_costs_its_small_neighbours_a_cycle_at_most() -> None:
    alike, flooded = (simulate(scenario(name), COSTS, seed=1) for name in ("small-16", "flooder"))
    cycle_s = flooded["compute_s_per_cycle"] + COSTS.outside_s
    for figure in ("mean", "p50", "p99"):
        before, after = (run["groups"]["small"]["step_s"][figure] for run in (alike, flooded))
        assert after <= 1.1 * before + cycle_s, figure


@pytest.mark.parametrize("name", LENGTH_MIXES)
def test_little_is_computed_for_nothing(name: str) -> None:
    assert simulate(scenario(f"mix-{name}"), COSTS, seed=1)["useful_over_computed"] >= 0.97


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["service-10000", "overload-10000"])
def test_ten_thousand_tenants_are_simulated(name: str) -> None:
    """All invariants hold at a size that no test machine reaches otherwise."""
    figures = simulate(scenario(name), COSTS, seed=0)
    assert figures["num_requests"] > 20_000
