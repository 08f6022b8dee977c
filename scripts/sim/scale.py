"""The runs behind docs/scale.md: how many tenants, what a death costs, what an overload and a lost rack do.

Everything twice: at the measured costs of the 1M model on a CPU, and at assumed ones of an 8B model on a GPU, which
happens to train about as many tokens per second, so the same tenants fit on as many workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import report

from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.scenario import Scenario, scenario
from treadle.testing.simulation.simulate import simulate

_SIZES = ("service-40", "service-400", "service-1000")
_LARGE = ("service-10000",)
_DEATHS = ("worker-deaths", "leader-deaths", "rack-loss")
# The target cycle time that architecture.md names for GPUs.
_GPU_CYCLE_S = 1.0


def scale(costs: Costs, gpu: Costs, *, seed: int) -> dict[str, Any]:
    """Everything, and its tables on stdout."""
    on_gpu = [_on_gpu(scenario(name)) for name in _SIZES]
    return {
        "deaths": _shown("deaths", _deaths(costs, seed, is_gpu=False)),
        "deaths, gpu": _shown("deaths, gpu", _deaths(gpu, seed, is_gpu=True)),
        "sizes, gpu": _shown("sizes, gpu", {chosen.name: _size(chosen, gpu, seed) for chosen in on_gpu}),
        "sizes": _shown("sizes", {name: _size(scenario(name), costs, seed) for name in _SIZES + _LARGE}),
    }


def _shown(title: str, table: dict[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    rows = [[label, *values.values()] for label, values in table.items()]
    report.print_table(title, ["", *next(iter(table.values()))], rows)
    return table


def _on_gpu(chosen: Scenario) -> Scenario:
    return replace(chosen, clock=replace(chosen.clock, target_cycle_s=_GPU_CYCLE_S))


def _deaths(costs: Costs, seed: int, *, is_gpu: bool) -> dict[str, Mapping[str, Any]]:
    """Each also with a quarantine that hears of a request at its second death only."""
    table = {}
    for name in _DEATHS:
        chosen = _on_gpu(scenario(name)) if is_gpu else scenario(name)
        table[name] = _death(chosen, costs, seed)
        if chosen.faults.lost_workers:
            continue
        lenient = replace(chosen, clock=replace(chosen.clock, suspect_after=2))
        table[f"{name}, suspects at the second death"] = _death(lenient, costs, seed)
    return table


def _size(chosen: Scenario, costs: Costs, seed: int) -> Mapping[str, Any]:
    run = simulate(chosen, costs, seed=seed)
    paired = run["groups"].get("paired", {"step_s": {}, "wait_s": {}})
    seconds = chosen.duration_s - chosen.warmup_s
    return {
        "tenants": sum(group.tenants for group in chosen.groups),
        "workers": chosen.num_workers,
        "busy": run["busy"],
        "tokens_per_s": run["tokens_per_s"],
        "ops_per_s": round(run["ops_per_cycle"] * run["num_cycles"] / seconds, 1),
        "cycles_per_s": round(run["num_cycles"] / seconds, 1),
        "snapshots_per_s": round(run["faults"]["snapshots"] / chosen.duration_s, 2),
        "step_p50_s": paired["step_s"].get("p50"),
        "step_p99_s": paired["step_s"].get("p99"),
        "wait_p99_s": paired["wait_s"].get("p99"),
    }


def _death(chosen: Scenario, costs: Costs, seed: int) -> Mapping[str, Any]:
    run = simulate(chosen, costs, seed=seed)
    faults, step_s = run["faults"], run["groups"]["paired"]["step_s"]
    return {
        "tokens_per_s": run["tokens_per_s"],
        "deaths": faults["deaths"],
        "restores": faults["restores"],
        "replayed_tokens": faults["replayed_tokens"],
        "pause_p50_s": faults["pause_s"].get("p50", 0.0),
        "pause_p95_s": faults["pause_s"].get("p95", 0.0),
        "step_p50_s": step_s["p50"],
        "step_p99_s": step_s["p99"],
    }
