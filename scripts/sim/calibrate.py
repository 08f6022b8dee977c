"""Costs of a real server: t(T) = a + b T of its cycles, what a cycle costs beside them, and a client's turn-around.

Also the held-out comparison: loads that were not fitted, on the real server and in virtual time.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from models import make_model
from real_server import RealLoad, RealServer, run_load

from treadle.testing.simulation.clients import Habit
from treadle.testing.simulation.costs import Costs, CycleSample, fit
from treadle.testing.simulation.draws import LENGTH_MIXES, Lengths
from treadle.testing.simulation.scenario import Group, Scenario
from treadle.testing.simulation.simulate import simulate

# Loads that costs are fitted to: from tiny cycles to full ones.
_FITTED: Mapping[str, tuple[Group, ...]] = {
    "tiny": (Group("tiny", 1, Habit(Lengths.always(16), datums=1)),),
    "single": (Group("single", 1, Habit(Lengths.always(128), datums=4)),),
    "some": (Group("some", 4, Habit(Lengths.always(64), datums=2, depth=2)),),
    "full": (Group("full", 8, Habit(Lengths.always(128), datums=4, depth=2)),),
    "large": (Group("large", 2, Habit(LENGTH_MIXES["short"], datums=8, depth=2)),),
}
# Loads that the simulator has to predict.
_HELD_OUT: Mapping[str, tuple[Group, ...]] = {
    "one": (Group("paired", 1, Habit(Lengths.always(96), datums=4)),),
    "four": (Group("paired", 4, Habit(Lengths.always(128), datums=4)),),
    "eight": (Group("paired", 8, Habit(Lengths.always(128), datums=4)),),
    "synchronous": (Group("synchronous", 4, Habit(Lengths.always(128), datums=4, is_paired=False)),),
    "flooder": (
        Group("small", 7, Habit(Lengths.always(128), datums=4)),
        Group("flooder", 1, Habit(LENGTH_MIXES["short"], datums=16, depth=4, passes_per_step=2)),
    ),
}
# Those of the fitted loads under which somebody always waits: between two cycles nobody's client is waited for.
_NEVER_IDLE = ("some", "full", "large")
_WARMUP_S = 2.0


def calibrate(*, source: Path, load_s: float, rounds: int, deaths: int) -> dict[str, Any]:
    """The costs, what they were fitted to, and how well they predict the loads that they were not fitted to."""
    with tempfile.TemporaryDirectory() as folder:
        server = RealServer(make_model(Path(folder), "1m"), Path(folder), source=source)
        try:
            loads = _run_all(server, load_s, rounds)
            pauses = [_pause_of_a_death(server, index) for index in range(deaths)]
            packed_tokens = server.packed_tokens()
            storage = server.storage()
        finally:
            server.stop()
    fitted = {name: loads[name] for name in _FITTED}
    coefficients = fit(_samples(fitted.values(), packed_tokens))
    outside_s, outside_token_s = _fit_outside([loads[name] for name in _NEVER_IDLE])
    single_s = outside_s + outside_token_s * statistics.median(cycle.num_tokens for cycle in loads["single"].cycles)
    turns_s = [gap_s * _quiet_share(loads["single"]) - single_s for gap_s in _gaps_s(loads["single"])]
    turn_s = max(0.0, statistics.median(turns_s))
    submits_s = [gap_s * _quiet_share(loads["single"]) for gap_s in loads["single"].submit_gaps_s]
    submit_s = statistics.median(submits_s)
    costs = Costs(
        forward_s=coefficients["forward_s"],
        token_s=coefficients["token_s"],
        op_s=coefficients["op_s"],
        outside_s=outside_s,
        outside_token_s=outside_token_s,
        client_s=turn_s,
        client_cv=_spread_of(turns_s) / turn_s if turn_s else 0.0,
        submit_s=submit_s,
        submit_cv=_spread_of(submits_s) / submit_s if submit_s else 0.0,
        packed_tokens=packed_tokens,
        # Of the engine's own benchmark on this model at rank 8 to 16: decode 1.9 ms, encode 1.1 ms, and one fsync.
        restore_s=0.003,
        snapshot_s=0.0015,
        write_s=0.01,
        respawn_s=statistics.median(pauses) if pauses else Costs(0.0, 0.0).respawn_s,
    )
    costs = Costs(**{name: _rounded(value) for name, value in costs.to_json().items()})
    return {
        "costs": costs.to_json(),
        "fit": {
            "median_error": _rounded(coefficients["median_error"]),
            "loads": {name: _summary(load) for name, load in fitted.items()},
        },
        "storage": storage,
        "worker_pause_s": [_rounded(pause) for pause in pauses],
        "held_out": {name: _compared(groups, loads[name], costs) for name, groups in _HELD_OUT.items()},
    }


def _run_all(server: RealServer, load_s: float, rounds: int) -> dict[str, RealLoad]:
    """Every load, in turn and again, so that the machine's good and bad minutes meet all of them."""
    loads: dict[str, RealLoad] = {}
    for number in range(rounds):
        for name, groups in (_FITTED | _HELD_OUT).items():
            load = run_load(server, groups, warmup_s=_WARMUP_S, window_s=load_s, name=f"{name}{number}")
            loads[name] = loads[name] + load if name in loads else load
    return loads


def _samples(loads: Iterable[RealLoad], packed_tokens: int) -> list[CycleSample]:
    """Cycles in CPU-seconds of the worker: on a busy machine, what they would take on a quiet one."""
    return [
        CycleSample(
            cycle.num_tokens,
            cycle.num_ops,
            -(-cycle.num_tokens // packed_tokens),
            cycle.compute_s * _quiet_share(load),
        )
        for load in loads
        for cycle in load.cycles
        if cycle.num_tokens
    ]


def _quiet_share(load: RealLoad) -> float:
    """CPU-seconds over wall seconds of the worker's cycles. It does some work between them too, so this is too high."""
    return min(1.0, load.worker_cpu_s / sum(cycle.compute_s for cycle in load.cycles))


def _gaps_s(load: RealLoad) -> list[float]:
    """Seconds between the ends of two cycles in which the worker did not compute."""
    return [
        max(0.0, after.ended_s - before.ended_s - after.compute_s)
        for window in load.windows
        for before, after in pairwise(window)
    ]


def _fit_outside(loads: Sequence[RealLoad]) -> tuple[float, float]:
    """Seconds between cycles per cycle, and per token of one: a line through the loads' medians, never falling."""
    tokens = [statistics.median(cycle.num_tokens for cycle in load.cycles) for load in loads]
    gaps_s = [statistics.median(_gaps_s(load)) * _quiet_share(load) for load in loads]
    slope, intercept = statistics.linear_regression(tokens, gaps_s)
    return (intercept, slope) if slope > 0 < intercept else (statistics.median(gaps_s), 0.0)


def _spread_of(values: Sequence[float]) -> float:
    """A standard deviation that outliers do not move: the middle half of a normal distribution is 1.35 wide."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.35


def _pause_of_a_death(server: RealServer, index: int) -> float:
    """Seconds from SIGKILL of the worker to the first cycle after it, for a run that is training."""
    group = Group("victim", 1, Habit(Lengths.always(128), datums=4))
    killed = 0.0

    def kill_later() -> None:
        nonlocal killed
        time.sleep(_WARMUP_S + 1.0)
        killed = time.time()
        server.kill_worker()

    thread = threading.Thread(target=kill_later, daemon=True)
    thread.start()
    run_load(server, (group,), warmup_s=_WARMUP_S, window_s=15.0, name=f"victim{index}")
    thread.join()
    return server.cycles(since_s=killed + 0.2)[0].ended_s - killed


def _compared(groups: tuple[Group, ...], load: RealLoad, costs: Costs) -> dict[str, Any]:
    """Real and simulated figures of one load, and simulated over real, at the speed the machine had under that load.

    slowdown: what its cycles took over what they cost. On a shared machine, beside clients of other sizes, it is not
    1; all costs are multiplied by it, so that what is compared is what the clock does.
    """
    took_s = sum(cycle.compute_s for cycle in load.cycles)
    slowdown = took_s / sum(
        costs.compute_s([cycle.num_tokens], num_ops=cycle.num_ops, num_restores=0) for cycle in load.cycles
    )
    costs = _slowed(costs, slowdown)
    scenario = Scenario("held out", groups, duration_s=120.0, warmup_s=20.0, starts_over_s=0.1)
    figures = simulate(scenario, costs, seed=0)
    real = _summary(load)
    simulated = {
        "tokens_per_s": figures["tokens_per_s"],
        "cycles_per_s": _rounded(figures["num_cycles"] / 100.0),
        "tokens_per_cycle": figures["tokens_per_cycle"],
        "compute_s_per_cycle": figures["compute_s_per_cycle"],
        "tokens_per_compute_s": _rounded(figures["tokens_per_cycle"] / figures["compute_s_per_cycle"]),
        "step_s_p50": {group: values["step_s"]["p50"] for group, values in figures["groups"].items()},
    }
    numbers = [key for key, value in simulated.items() if isinstance(value, float)]
    return {
        "slowdown": _rounded(slowdown),
        "real": real,
        "simulated": simulated,
        "simulated_over_real": {key: _rounded(simulated[key] / real[key]) for key in numbers}
        | {
            f"step_s_p50 {group}": _rounded(value / real["step_s_p50"][group])
            for group, value in simulated["step_s_p50"].items()
            if real["step_s_p50"].get(group)
        },
    }


def _slowed(costs: Costs, slowdown: float) -> Costs:
    names = ("forward_s", "token_s", "op_s", "outside_s", "outside_token_s", "client_s", "submit_s")
    return replace(costs, **{name: slowdown * getattr(costs, name) for name in names})


def _summary(load: RealLoad) -> dict[str, Any]:
    """Rates are taken from the end of a window's first cycle to that of its last: its own edges cut long cycles."""
    cycles = [cycle for window in load.windows for cycle in window[1:]]
    lasted_s = sum(window[-1].ended_s - window[0].ended_s for window in load.windows)
    tokens = sum(cycle.num_tokens for cycle in cycles)
    compute_s = sum(cycle.compute_s for cycle in cycles)
    all_tokens = sum(cycle.num_tokens for cycle in load.cycles)
    return {
        "num_cycles": len(cycles),
        "tokens_per_s": _rounded(tokens / lasted_s),
        "cycles_per_s": _rounded(len(cycles) / lasted_s),
        "tokens_per_cycle": _rounded(tokens / len(cycles)),
        "compute_s_per_cycle": _rounded(compute_s / len(cycles)),
        "tokens_per_compute_s": _rounded(tokens / compute_s),
        "worker_cpu_over_compute": _rounded(_quiet_share(load)),
        "tokens_per_server_cpu_s": _rounded(all_tokens / load.server_cpu_s),
        "gap_s_median": _rounded(statistics.median(_gaps_s(load))),
        "step_s_p50": {group: _rounded(statistics.median(values)) for group, values in load.step_s.items() if values},
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
